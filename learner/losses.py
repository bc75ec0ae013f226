"""A recipe's loss at each position: what the student minimises, as a row of terms.

Legend: N positions (response tokens), D features, V vocabulary (the common prefix of both models').
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import RecipeConfig
from distill.objectives import (
    critic_loss,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    moment_gap,
    policy_gradient,
    reverse_kl,
)
from learner.critics import Source
from learner.positions import Policies


def text_weights(recipe: RecipeConfig) -> dict[Source, float]:
    """Weight of the main loss on either text: 1 − β and β when every update holds both."""
    if recipe.student_text == "every_update" and recipe.off_policy_text != "none":
        return {"off": 1 - recipe.beta, "on": recipe.beta}
    return {"off": 1.0, "on": 1.0}


def position_losses(
    recipe: RecipeConfig,
    source: Source,
    both: Policies,
    targets: Int[Tensor, " N"],
    *,
    f: Float[Tensor, "N V"] | None = None,
    variance_penalty: float = 0.0,
    advantage: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """The student's loss at each position of one text; a recipe is what this adds up.

    ``f``: the critic's values, constants. ``variance_penalty``: λ of the zero-sum game, in which
    the student sees the penalty too; 0 hides it. ``advantage``: A_t of tokens that the student
    sampled.
    """
    loss = torch.zeros_like(both.policy_logprobs[:, 0])
    weight = text_weights(recipe)[source]
    if weight * recipe.loss_weight > 0:
        loss = loss + weight * recipe.loss_weight * _main_loss(recipe, both, f, variance_penalty)
    if source == "on" and advantage is not None and weight * recipe.long_weight > 0:
        long_horizon = policy_gradient(both.policy_logprobs, targets, advantage)
        loss = loss + weight * recipe.long_weight * long_horizon
    if source == "off" and recipe.anchor_weight > 0:
        anchor = forward_kl(*both.pair, teacher_probs=both.teacher_probs)
        loss = loss + recipe.anchor_weight * anchor
    if source == "off" and recipe.lm_weight > 0:
        loss = loss + recipe.lm_weight * cross_entropy(both.policy_logprobs, targets)
    return loss


def _main_loss(recipe: RecipeConfig, both: Policies, f: Tensor | None, variance_penalty: float) -> Tensor:
    if recipe.loss == "forward_kl":
        return forward_kl(*both.pair, teacher_probs=both.teacher_probs)
    if recipe.loss == "reverse_kl":
        return reverse_kl(*both.pair, policy_probs=both.policy_probs)
    if recipe.loss == "generalized_jsd":
        return generalized_jsd(*both.pair, recipe.jsd_beta, **both.probs)
    if f is None:
        raise ValueError("the moment gap needs a critic's values")
    if variance_penalty > 0:
        return -critic_loss(*both.pair, f.detach(), variance_penalty, **both.probs)
    return moment_gap(*both.pair, f.detach(), **both.probs)


def needs_critics(recipe: RecipeConfig) -> bool:
    """False also where the main loss is switched off (an anchor alone, cross-entropy alone)."""
    return recipe.uses_critics and recipe.loss_weight > 0
