"""Adversarial moment-matching distillation of large language models.

A teacher is fixed; a student is trained. Rollout actors sample the student's text, a
teacher actor scores it, a replay buffer keeps it, and a learner trains two critics, which
look for moments in which student and teacher differ, and the student against them.

This package is the method: no Ray, no vLLM. Read :mod:`distill.algorithm` first (the three
loops), then :mod:`distill.objectives` (the losses) and :mod:`distill.schema` (the rows).
``actors`` makes rows, ``learner`` uses them, ``deploy`` puts them on a machine.
"""

__version__ = "0.1.0"
