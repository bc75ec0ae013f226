"""One update: first the critics, then the student against them.

Read :func:`update` first, then :func:`critic_update` and :func:`student_update`. Why this order:

1. The student's states at all response positions are kept from one pass. The critics read them
   as constants, so no critic step runs the backbone again; nor does step 4 where the pass could
   keep its activations (``learner.keep_activations``).
2. K critic steps, each on its own slice of the positions: a critic step needs the logits of
   both policies, and so they are formed once per position whatever K is. The first slice is
   measured before its step, while it is fresh to the critic (in-sample, tightness flatters).
3. With a long horizon, the moment gaps of the student's text under the new critics become
   advantages. A token's credit needs its whole row and group, micro-batches see parts of them.
4. The student step: the packs are micro-batches that accumulate one gradient. Every term has
   the whole update's number of tokens as its denominator, so where rows are packed is nothing
   the student can notice.

The student minimises, with w the weights of the two texts ((1−β, β), or 1 for a text without the
other), f1 and f2 the critics, constants here, and every mean over the tokens of one text:

    w_off mean[ g_f1 ] + w_on mean[ g_f2 ] + w_on c_long mean[ log π(a_t) A_t ]
      + η_kl mean_off[ KL(π* || π) ] + η_lm mean_off[ −log π(y_t) ]

with another divergence in place of both g when the recipe says so. At π = π* the first two and
the fourth are 0 whatever the critics are.

Legend: L inputs of a pack, N positions (response tokens), B rows, T longest response, D features,
V vocabulary (the common prefix of both models' vocabularies).
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.config import CriticConfig, LearnerConfig, RecipeConfig
from distill.credit import advantages, to_rows
from learner.batch import TokenBatch
from learner.critic_step import critic_update, moment_gaps
from learner.critics import CriticPair
from learner.losses import needs_critics
from learner.positions import Heads, Student, collect_positions
from learner.student_step import student_update
from learner.vocabulary import Head


def update(
    student: Student,
    optimizer: torch.optim.Optimizer,
    batch: TokenBatch,
    teacher: Head | None,
    critics: CriticPair | None,
    recipe: RecipeConfig,
    critic: CriticConfig,
    learner: LearnerConfig,
    *,
    seed: int,
    critics_only: bool = False,
) -> dict[str, float]:
    """Critics, then student; returns the metrics of this update.

    ``teacher`` may be None for a recipe without teacher payload, ``critics`` for one without
    critics. ``seed`` chooses which positions each critic step sees; pass the update's number.
    ``critics_only``: a warm-up update, the student stays.
    """
    metrics: dict[str, float] = {}
    credit: Tensor | None = None
    states: list[Tensor] | None = None
    if needs_critics(recipe):
        if teacher is None or critics is None:
            raise ValueError(f"recipe {recipe.name} needs a teacher head and critics")
        chunk = learner.vocabulary_chunk
        heads = Heads.of(student, teacher)
        keep_graph = learner.keep_activations and not critics_only
        positions, states = collect_positions(student, batch, keep_graph=keep_graph)
        metrics |= critic_update(
            positions, heads, critics, critic, chunk=chunk, seed=seed, warm_up=critics_only
        )
        if recipe.long_weight > 0 and not critics_only:
            rollouts = positions.of("on")
            gaps = moment_gaps(rollouts, heads, critics.on, chunk=chunk)
            rows, mask = to_rows(gaps, rollouts.row, rollouts.step, len(batch.group))
            credit = advantages(rows, mask, batch.group, recipe.gamma)
    if not critics_only:
        metrics |= student_update(
            student, optimizer, batch, teacher, critics, recipe, critic, learner, credit, states
        )
    return metrics
