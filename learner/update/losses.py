"""A recipe's loss at each position: the terms that the student minimises.

Legend: N positions (response tokens), D features, V vocabulary (the common prefix of both models').
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import Loss, RecipeConfig
from distill.objectives import (
    clipped_policy_gradient,
    critic_loss,
    cross_entropy,
    forward_kl,
    generalized_jsd,
    moment_gap,
    policy_gradient,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from learner.batch import Text
from learner.update.positions import Policies


def text_weights(recipe: RecipeConfig) -> dict[Text, float]:
    """Weight of the main loss on each text: 1 − β and β if every update contains both, otherwise 1."""
    if recipe.student_text == "every_update" and recipe.teacher_text != "none":
        return {"teacher_text": 1 - recipe.beta, "student_text": recipe.beta}
    return {"teacher_text": 1.0, "student_text": 1.0}


DIVERGENCES: Mapping[str, Callable[[Policies, RecipeConfig], Tensor]] = {
    "forward_kl": lambda both, recipe: forward_kl(*both.pair, teacher_probs=both.teacher_probs),
    "reverse_kl": lambda both, recipe: reverse_kl(*both.pair, policy_probs=both.policy_probs),
    "generalized_jsd": lambda both, recipe: generalized_jsd(*both.pair, recipe.jsd_beta, **both.probs),
    "skew_forward_kl": lambda both, recipe: skew_forward_kl(*both.pair, recipe.skew, **both.probs),
    "skew_reverse_kl": lambda both, recipe: skew_reverse_kl(*both.pair, recipe.skew, **both.probs),
}
"""Every ``recipe.loss`` except the moment gap. A new one is a line here, a name in the config, a preset."""


def position_losses(
    recipe: RecipeConfig,
    text: Text,
    both: Policies,
    targets: Int[Tensor, " N"],
    *,
    f: Float[Tensor, "N V"] | None = None,
    variance_penalty: float = 0.0,
    advantage: Float[Tensor, " N"] | None = None,
    behavior_logprobs: Float[Tensor, " N"] | None = None,
    ppo_clip: float | None = None,
) -> Float[Tensor, " N"]:
    """The student's loss at each position of one text: the sum of the recipe's terms.

    ``f``: the witness's values, constants. ``variance_penalty``: λ of the zero-sum game, in which the
    student sees the penalty too; 0 hides it. ``advantage``: A_t of tokens that the student sampled,
    ``behavior_logprobs`` their log-probability under the policy that sampled (for ``ppo_clip``).
    """
    loss = torch.zeros_like(both.policy_logprobs[:, 0])
    weight = text_weights(recipe)[text]
    if weight * recipe.loss_weight > 0:
        main = _main_loss(recipe.loss_on(text), recipe, both, f, variance_penalty)
        loss = loss + weight * recipe.loss_weight * main
    if text == "student_text" and advantage is not None and weight * recipe.long_weight > 0:
        if ppo_clip is None:
            score = policy_gradient(both.policy_logprobs, targets, advantage)
        else:
            assert behavior_logprobs is not None
            score = clipped_policy_gradient(
                both.policy_logprobs, targets, advantage, behavior_logprobs, ppo_clip
            )
        loss = loss + weight * recipe.long_weight * score
    if text == "teacher_text" and recipe.anchor_weight > 0:
        loss = loss + recipe.anchor_weight * DIVERGENCES[recipe.anchor](both, recipe)
    if text == "teacher_text" and recipe.lm_weight > 0:
        loss = loss + recipe.lm_weight * cross_entropy(both.policy_logprobs, targets)
    return loss


def _main_loss(
    name: Loss, recipe: RecipeConfig, both: Policies, f: Tensor | None, variance_penalty: float
) -> Tensor:
    if name != "moment_gap":
        return DIVERGENCES[name](both, recipe)
    if f is None:
        raise ValueError("the moment gap needs a witness's values")
    if variance_penalty > 0:
        return -critic_loss(*both.pair, f.detach(), variance_penalty, **both.probs)
    return moment_gap(*both.pair, f.detach(), **both.probs)
