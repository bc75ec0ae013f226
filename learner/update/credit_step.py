"""Credit for the student's tokens: the advantages of the long-horizon term.

A token's credit depends on the rest of its row and on the other members of its group, of which a
micro-batch sees only parts. It is therefore computed for the whole update, after the critic steps and
without gradients, and the packs of the student step look it up.

Legend: N positions (response tokens), B rows, T longest response.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import CreditConfig, RecipeConfig
from distill.credit import advantages, products_before, to_rows
from distill.objectives import critic_loss, moment_gap
from learner.model.chunked import ChunkedLogits, chunked_blocks
from learner.ranks import ALONE, Ranks
from learner.update.positions import Heads, Policies, Positions
from learner.update.witness import Witness


class Credit(NamedTuple):
    """Credit by row and step of student text; entries without a sampled token are meaningless."""

    advantage: Float[Tensor, "B T"]
    """A_t, times the token's own importance ratio if ``credit.ratio`` asks for it."""
    weight: Float[Tensor, "B T"] | None
    """Π_{u<t} r_u, the weight of every loss of a position; None stands for 1."""


class _AtTokens(NamedTuple):
    """The gap before each token, and both policies' log-probability of the token itself."""

    gap: Float[Tensor, " N"]
    policy_logprob: Float[Tensor, " N"]
    teacher_logprob: Float[Tensor, " N"]


def needs_credit(recipe: RecipeConfig, config: CreditConfig) -> bool:
    """Whether an update needs whole rows of student text before the student step."""
    return recipe.uses_student_text and (recipe.long_weight > 0 or config.ratio == "per_decision")


@torch.no_grad()
def assign_credit(
    positions: Positions,
    group: Int[Tensor, " B"],
    heads: Heads,
    witness: Witness | None,
    recipe: RecipeConfig,
    config: CreditConfig,
    *,
    chunk: int,
    variance_penalty: float = 0.0,
    ranks: Ranks = ALONE,
) -> Credit:
    """Advantages, and importance weights, of every token of student text.

    ``positions``: those of student text. ``group``: the group of every row of the batch, -1 for teacher
    text. ``witness``: None if no token is charged with its gaps. ``variance_penalty``: λ if the student
    sees the penalty (``critic.zero_sum``), whose distance then includes it at every later position too.
    """
    here = _at_tokens(positions, heads, witness, chunk, variance_penalty)
    log_ratio = here.policy_logprob - here.teacher_logprob
    cost = (here.gap if config.cost == "moment_gap" else log_ratio) / config.cost_scale
    if config.cost_max is not None:
        cost = cost.clamp(-config.cost_max, config.cost_max)
    ratio = (here.policy_logprob - positions.behavior_logprobs).exp()
    if config.ratio_max is not None:
        ratio = ratio.clamp_max(config.ratio_max)

    costs, mask = to_rows(cost, positions.row, positions.step, len(group))
    ratios, _ = to_rows(ratio, positions.row, positions.step, len(group), fill=1.0)
    per_decision = config.ratio == "per_decision"
    advantage = advantages(
        costs,
        mask,
        group,
        recipe.gamma,
        span=config.span,
        normalize="none" if config.form == "exact" else config.normalize,
        baseline=config.baseline,
        ratios=ratios if per_decision else None,
        cost_of="state" if config.cost == "moment_gap" else "token",
        total=ranks.sum,
    )
    if config.ratio != "none" and config.ppo_clip is None:
        advantage = advantage * ratios
    return Credit(advantage, products_before(ratios) if per_decision else None)


def _at_tokens(
    positions: Positions, heads: Heads, witness: Witness | None, chunk: int, variance_penalty: float
) -> _AtTokens:
    policy_logits = ChunkedLogits(heads.student, positions.student_hidden, chunk)
    teacher_logits = ChunkedLogits(heads.teacher, positions.teacher_hidden, chunk)
    values = None
    if witness is not None:
        values = witness.at(positions.teacher_hidden, positions.student_hidden, chunk)
    wide = torch.promote_types(positions.student_hidden.dtype, torch.float32)
    zeros = positions.student_hidden.new_zeros(len(positions), dtype=wide)
    found = _AtTokens(zeros, zeros.clone(), zeros.clone())
    for where in chunked_blocks(len(positions), heads.num_tokens, chunk, found.gap.device):
        both = Policies.from_logits(policy_logits(where), teacher_logits(where))
        if values is not None:
            f = values(where, both, both.log_ratio())
            if variance_penalty:
                found.gap[where] = -critic_loss(*both.pair, f, variance_penalty, **both.probs)
            else:
                found.gap[where] = moment_gap(*both.pair, f, **both.probs)
        targets = positions.targets[where, None]
        found.policy_logprob[where] = both.policy_logprobs.gather(1, targets).squeeze(1)
        found.teacher_logprob[where] = both.teacher_logprobs.gather(1, targets).squeeze(1)
    return found
