"""One update: first the critics, then the student against them.

Read :func:`update` first, then :func:`critic_step`, :func:`assign_credit` and
:func:`student_step`. Why this order:

1. The student's states at all response positions are kept from one pass. The critics read them
   as constants, so no critic step runs the backbone again; nor does step 4 where the pass could
   keep its activations (``learner.keep_activations``).
2. K critic steps, each on its own slice of the positions: a critic step needs the logits of
   both policies, and so they are formed once per position whatever K is. The first slice is
   measured before its step, while it is fresh to the critic (in-sample, tightness flatters).
3. With a long horizon, the moment gaps of the student's text under the new critics (or another
   cost of its tokens) become advantages (:mod:`learner.update.credit_step`).
4. The student step: the packs are micro-batches that accumulate one gradient. Every term has
   the whole update's number of tokens as its denominator, so where rows are packed is nothing
   the student can notice.

The student minimises, with w the weights of the two texts ((1−β, β), or 1 for a text without the
other), f1 and f2 the critics, constants here, and every mean over the tokens of one text:

    w_off mean[ g_f1 ] + w_on mean[ g_f2 ] + w_on c_long mean[ log π(a_t) A_t ]
      + η_kl mean_off[ D(π*, π) ] + η_lm mean_off[ −log π(y_t) ]

with D the anchor, forward KL unless the recipe says so, and another divergence in place of both g
likewise. At π = π* the first two and the fourth are 0 whatever the critics are. With
``credit.form=exact`` a mean is a sum with weights γ^t over every response, divided by their
number: L_off and L_on themselves.

Legend: L inputs of a pack, N positions (response tokens), B rows, T longest response, D features,
V vocabulary (the common prefix of both models' vocabularies).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.config import MethodConfig
from learner.batch import TokenBatch
from learner.model.head import Head
from learner.ranks import ALONE, Ranks
from learner.update.credit_step import Credit, assign_credit, needs_credit
from learner.update.critic_step import critic_step
from learner.update.critics import CriticPair
from learner.update.positions import Heads, TrainedModel, collect_positions
from learner.update.student_step import student_step
from learner.update.witness import witnesses


def update(
    student: TrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: TokenBatch,
    teacher: Head | None,
    critics: CriticPair | None,
    method: MethodConfig,
    *,
    seed: int,
    critics_only: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Critics, then student; returns the metrics of this update.

    ``teacher`` may be None for a recipe without teacher payload, ``critics`` for one without
    learned critics. ``seed`` chooses which positions each critic step sees; pass the update's
    number. ``critics_only``: a warm-up update, the student stays if there are learned critics.
    ``ranks``: who else has groups of this update; metrics and step are then the same on all.

    Raises: FloatingPointError when a loss or gradient is not finite; what it is of has not moved.
    """
    batch = batch.over(ranks)
    recipe, chunk = method.recipe, method.learner.vocabulary_chunk
    if recipe.payload == "text":
        return student_step(student, optimizer, batch, None, None, method, ranks=ranks)
    if teacher is None:
        raise ValueError(f"recipe {recipe.name} needs the teacher's head")
    heads = Heads.of(student, teacher)
    charges = needs_credit(recipe, method.credit) and batch.num_student_tokens > 0 and not critics_only
    metrics: dict[str, float] = {}
    states: list[Tensor] | None = None
    credit: Credit | None = None
    if charges or (method.uses_moment_gap and critics is not None):
        keep_graph = method.learner.keep_activations and not critics_only
        positions, states = collect_positions(student, batch, keep_graph=keep_graph)
        if method.uses_moment_gap and critics is not None:
            metrics |= critic_step(
                positions, heads, critics, method.critic, chunk=chunk, seed=seed, warm_up=critics_only,
                from_text=recipe.teacher_gives == "text", ranks=ranks,
                discount=recipe.gamma if method.credit.form == "exact" else 1.0,
            )  # fmt: skip
        if critics_only:
            return metrics
    opponents = witnesses(method.critic, critics, heads) if method.uses_moment_gap else {}
    if charges:
        credit = assign_credit(
            positions.of("student_text"), batch.group, heads, opponents.get("student_text"), recipe, method.credit, chunk=chunk,
            variance_penalty=method.critic.penalty if method.critic.zero_sum else 0.0, ranks=ranks,
        )  # fmt: skip
    return metrics | student_step(
        student, optimizer, batch, heads, opponents, method, credit, states, ranks=ranks
    )
