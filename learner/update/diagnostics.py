"""What the student's step measures beside its losses: sums over positions, and their means.

Called by :mod:`learner.update.student_step` for every block of positions. Nothing here has a gradient or
changes an update. Names are ``<text>.<what>`` where both texts have the metric, else ``<what>``; the
recorded metric is ``policy/<name>``.

Legend: N positions (response tokens), V vocabulary (the common prefix of both models').
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.objectives import cross_entropy, entropy, moment_gap
from learner.batch import Text
from learner.update.positions import Policies

Sums = dict[str, Tensor]
"""Scalars that add up over blocks, packs and ranks."""

_COUNT = "num_"
"""Prefix of the count by which a sum is divided; without one it is the tokens of its text."""


@torch.no_grad()
def of_policies(
    text: Text,
    both: Policies,
    tv: Float[Tensor, " N"],
    log_ratio: Float[Tensor, "N V"],
    f: Float[Tensor, "N V"] | None,
) -> Sums:
    """Exact divergences of the policies (``tv`` among them), and the gap of the text's witness.

    Both divergences come from one log-ratio: the logits of a batch are finite, and every pass over the
    vocabulary takes noticeable time.
    """
    values = {
        "tv": tv,
        "forward_kl": torch.linalg.vecdot(both.teacher_probs, log_ratio),
        "reverse_kl": -torch.linalg.vecdot(both.policy_probs, log_ratio),
        "entropy": entropy(both.policy_logprobs, policy_probs=both.policy_probs),
    }
    if f is not None:
        values["moment_gap"] = moment_gap(*both.pair, f, **both.probs)
    return {f"{text}.{name}": value.sum() for name, value in values.items()}


@torch.no_grad()
def of_student_text(
    both: Policies,
    tv: Float[Tensor, " N"],
    tokens: Int[Tensor, " N"],
    step: Int[Tensor, " N"],
    length: Int[Tensor, " N"],
    behavior_logprobs: Float[Tensor, " N"],
) -> Sums:
    """Drift and staleness of the student's own text.

    ``tv_early``, ``tv_late``: TV in the first and last ⌊T/3⌋ tokens of responses of T tokens (``length``).
    ``behavior_gap``: log μ(a) − log π(a), μ the policy that sampled; ``importance_ratio``: π(a)/μ(a).
    """
    third = length // 3
    early, late = (step < third).to(tv.dtype), (step >= length - third).to(tv.dtype)
    gap = behavior_logprobs + cross_entropy(both.policy_logprobs, tokens)
    ratio = (-gap).exp()
    values = {
        "student_text.tv_early": tv * early,
        "student_text.tv_late": tv * late,
        f"{_COUNT}student_text.tv_early": early,
        f"{_COUNT}student_text.tv_late": late,
        "behavior_gap": gap,
        "importance_ratio": ratio,
        "importance_ratio_square": ratio.square(),
    }
    return {name: value.sum() for name, value in values.items()}


@torch.no_grad()
def of_gradients(
    both: Policies, f: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], advantage: Float[Tensor, " N"]
) -> Sums:
    """Squared norms of the two gradients in the logits z of each position.

    Direct: ∂g_f/∂z = −p ∘ (f − E_p f). Long horizon: ∂(A log p(a))/∂z = A (1_a − p).
    """
    p = both.policy_probs
    direct = p * (f - torch.linalg.vecdot(p, f)[:, None])
    chosen = p.gather(1, tokens[:, None]).squeeze(1)
    squares = advantage.square() * (torch.linalg.vecdot(p, p) - 2 * chosen + 1)
    return {
        "direct_gradient_square": torch.linalg.vecdot(direct, direct).sum(),
        "long_gradient_square": squares.sum(),
    }


def means(sums: Sums, num_tokens: Mapping[Text, int]) -> Sums:
    """Sums over a whole update to means over the tokens they count, as metrics ``policy/...``.

    ``loss`` is a sum already. ``importance_ess``: effective share of the samples, (mean ρ)² / mean ρ²,
    1 on fresh text. ``long_over_direct``: norm of the long-horizon gradient over the direct one's.
    """
    found: Sums = {}
    for name, value in sums.items():
        if name.startswith(_COUNT):
            continue
        if name == "loss":
            count: Tensor | int = 1
        elif f"{_COUNT}{name}" in sums:
            count = sums[f"{_COUNT}{name}"].clamp_min(1)
        else:
            count = num_tokens["teacher_text" if name.startswith("teacher_text.") else "student_text"]
        found[f"policy/{name}"] = value / count
    square = found.pop("policy/importance_ratio_square", None)
    if square is not None:
        found["policy/importance_ess"] = found["policy/importance_ratio"].square() / square
    direct = found.pop("policy/direct_gradient_square", None)
    if direct is not None:
        ratio = found.pop("policy/long_gradient_square") / direct.clamp_min(1e-30)
        found["policy/long_over_direct"] = ratio.sqrt()
    return found
