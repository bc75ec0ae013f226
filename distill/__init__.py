"""Adversarial moment-matching distillation of large language models.

The teacher is fixed and the student is trained. Rollout actors sample the student's text, a
teacher actor scores it and a replay buffer keeps it. The learner trains two critics, which look for
moments in which student and teacher differ, and trains the student against them.

To understand the method, read ``docs/method.md`` and beside it ``learner/update/update.py``, which is one
update. This package contains the parts that need neither Ray nor vLLM: :mod:`distill.algorithm` (the three
loops), :mod:`distill.objectives` (the losses) and :mod:`distill.schema` (the rows).
``actors`` produces rows, ``learner`` trains on them, and ``deploy`` runs both on a machine.
"""

__version__ = "0.1.0"
