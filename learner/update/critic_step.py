"""The critics' part of an update: K optimizer steps, each on a slice of the positions.

Legend: N positions (response tokens), D features, V vocabulary (the common prefix of both models').
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.config import CriticConfig
from distill.objectives import (
    closed_form_critic,
    critic_loss,
    critic_loss_from_optimum,
    moment_gap,
    sampled_critic_loss,
)
from learner.batch import TEXTS
from learner.model.chunked import ChunkedLogits, chunked_loss
from learner.model.head import LogitTransform
from learner.ranks import ALONE, Ranks
from learner.update.critics import Critic, CriticPair, optimum
from learner.update.positions import Heads, Policies, Positions, to_floats

WARMUP_POSITIONS = 512
"""Approximate positions of a warm-up step: young critics learn more from many short steps."""
SATURATION = 0.95
"""Share of the bound beyond which an action value counts as saturated."""


def critic_step(
    positions: Positions,
    heads: Heads,
    critics: CriticPair,
    config: CriticConfig,
    *,
    chunk: int,
    update_number: int,
    warmup: bool = False,
    from_text: bool = False,
    discount: float = 1.0,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """K steps of both critics, on K disjoint slices of the positions.

    The slices together are all positions, unless ``positions_per_step`` makes them smaller. The first
    slice is measured before its step, while it is new to the critics.

    ``warmup``: as many steps as it takes for each to see about 512 positions. ``from_text``: the gap
    is taken between the text's tokens and the policy, because ``heads.teacher`` is a proxy's.
    ``discount``: a position weighs discount^t in its critic's mean: γ with ``credit.form=exact``, so that
    on fresh text the critics maximise the very distance that the student minimises.
    """
    device = positions.step.device
    slice_of, num_steps = _slices(positions, config, update_number, warmup, ranks)
    norms: list[Tensor] = []
    totals: dict[str, Tensor] = {}
    steps_of = dict.fromkeys(TEXTS, 0)
    for number in range(num_steps):
        critics.zero_grad()
        for text in TEXTS:
            part = positions.select(slice_of == number).of(text)
            weight = discount ** part.step.double()
            total = ranks.sum(weight.sum())
            if len(part):
                measure = steps_of[text] == 0
                means = _critic_gradient(
                    part, weight / total, heads, critics[text], config, chunk, measure, from_text
                )
                for name, value in means.items():
                    key = f"critic/{text}.{name}"
                    totals[key] = totals[key] + value if key in totals else value
            steps_of[text] += int(total > 0)
        ranks.sum_gradients(critics.parameters())
        norms.append(critics.step())
    totals = ranks.sum_by_name(totals, device)
    for text, steps in steps_of.items():
        if steps:
            totals[f"critic/{text}.loss"] /= steps
    return _tightness(to_floats(totals | {"critic/grad_norm": torch.stack(norms).mean()}))


def _slices(
    positions: Positions, config: CriticConfig, update_number: int, warmup: bool, ranks: Ranks
) -> tuple[Int[Tensor, " N"], int]:
    """The slice of each position, and how many of the slices get a step.

    A slice is every M-th token of every row, starting at ``update_number``. M, the number of slices, is at most
    the number of tokens of the longest row, so that no slice is empty. A slice depends on nothing but a
    token's place in its row, so neither packing nor the order of rows changes it.
    """
    device = positions.step.device
    num_positions = ranks.sum_count(len(positions), device)
    num_steps = config.num_steps
    if warmup:
        num_steps = max(num_steps, -(-num_positions // WARMUP_POSITIONS))
    num_slices = num_steps
    if config.positions_per_step is not None:
        num_slices = max(num_steps, -(-num_positions // config.positions_per_step))
    longest = int(positions.step.max()) + 1 if len(positions) else 1
    num_slices = min(num_slices, ranks.max_count(longest, device))
    return (positions.step + update_number) % num_slices, min(num_steps, num_slices)


def _critic_gradient(
    positions: Positions,
    share: Float[Tensor, " N"],
    heads: Heads,
    critic: Critic,
    config: CriticConfig,
    chunk: int,
    measure: bool,
    from_text: bool,
) -> dict[str, Tensor]:
    """Add the gradient of the critic's loss; returns this rank's part of the means.

    The loss is a sum with weights ``share``, which add up to 1 over all ranks.
    """
    policy_logits = ChunkedLogits(heads.student, positions.student_hidden, chunk)
    teacher_logits = ChunkedLogits(heads.teacher, positions.teacher_hidden, chunk)

    def loss_of_chunk(where: slice, bilinear: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            both = Policies.from_logits(policy_logits(where), teacher_logits(where))
            log_ratio = both.log_ratio()
        f = critic.activate(bilinear, log_ratio)
        if from_text:
            tokens = positions.targets[where]
            losses = sampled_critic_loss(
                both.policy_logprobs, tokens, f, config.penalty, policy_probs=both.policy_probs
            )
            metrics = _metrics_from_text(both, f.detach(), tokens, config) if measure else {}
        else:
            losses = _critic_losses(critic, both, f, log_ratio, config.penalty)
            metrics = _critic_metrics(both, f.detach(), config) if measure else {}
        weight = share[where].to(losses.dtype)
        return weight @ losses, {name: weight @ values for name, values in metrics.items()}

    loss, metrics = chunked_loss(
        critic.coefficients(positions.teacher_hidden, positions.student_hidden),
        critic.table(heads.teacher, heads.student),
        LogitTransform(),
        loss_of_chunk,
        chunk,
        parameters=critic.extra_parameters(),
    )
    loss.backward()
    return {"loss": loss.detach()} | metrics


def _critic_losses(
    critic: Critic, both: Policies, f: Tensor, log_ratio: Tensor, variance_penalty: float
) -> Float[Tensor, " N"]:
    """The critic's loss, in the form that has no rounding at a ratio-aware critic's start.

    Such a critic starts at the optimum, where the other form has a gradient of rounding errors. Adam divides a
    gradient by its size and would turn them into full steps, which differ with ``learner.vocabulary_chunk``.
    """
    if critic.ratio_weight is None:
        return critic_loss(*both.pair, f, variance_penalty, **both.probs)
    return critic_loss_from_optimum(f, optimum(log_ratio, variance_penalty), variance_penalty, **both.probs)


@torch.no_grad()
def _critic_metrics(both: Policies, f: Tensor, config: CriticConfig) -> dict[str, Float[Tensor, " N"]]:
    """The critic's gap, the gap of the best critic, and the probability mass with saturated values."""
    best = closed_form_critic(*both.pair, config.bound, config.penalty, **both.probs)
    saturated = (f.abs() > SATURATION * config.bound).to(f.dtype)
    mean_probs = (both.policy_probs + both.teacher_probs) / 2
    return {
        "d_mm": moment_gap(*both.pair, f, **both.probs),
        "best": moment_gap(*both.pair, best, **both.probs),
        "saturation": torch.linalg.vecdot(mean_probs, saturated),
    }


@torch.no_grad()
def _metrics_from_text(
    both: Policies, f: Tensor, tokens: Tensor, config: CriticConfig
) -> dict[str, Float[Tensor, " N"]]:
    """The gap between tokens and policy. Without probabilities the best critic's gap is unknown."""
    saturated = (f.abs() > SATURATION * config.bound).to(f.dtype)
    at_token = f.gather(1, tokens[:, None]).squeeze(1)
    return {
        "d_mm": at_token - torch.linalg.vecdot(both.policy_probs, f),
        "saturation": torch.linalg.vecdot(both.policy_probs, saturated),
    }


def _tightness(metrics: dict[str, float]) -> dict[str, float]:
    """Replace the best critic's gap with the share of it that the critic reaches; 1 if it is 0."""
    for text in TEXTS:
        best = metrics.pop(f"critic/{text}.best", None)
        if best is not None:
            gap = metrics[f"critic/{text}.d_mm"]
            metrics[f"critic/{text}.tightness"] = gap / best if best > 0 else 1.0
    return metrics
