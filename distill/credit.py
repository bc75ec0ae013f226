"""Credit of a token for the moment gaps that follow it: returns, baseline, advantage.

Called by ``learner.update`` between the critic steps and the student step, without gradients.
One convention: gaps lie padded as ``[B, T]``, row i holding the gap before response token t,
with a mask that is true where the row has a token; :func:`to_rows` brings flat positions
there. What is not masked counts 0: after a row's end everything is 0.

Legend: B rows, T longest response, N positions. t counts from 0; the symbols of the method,
G and R, count it from 1, which changes nothing but the name.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def to_rows(
    values: Float[Tensor, " N"], row: Int[Tensor, " N"], step: Int[Tensor, " N"], num_rows: int
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Scatter flat positions to ``[B, T]`` and say where they went.

    ``rows[row, step]`` is the way back.
    """
    length = int(step.max()) + 1 if len(step) else 0
    rows = values.new_zeros(num_rows, length)
    mask = torch.zeros(num_rows, length, dtype=torch.bool, device=values.device)
    rows[row, step] = values
    mask[row, step] = True
    return rows, mask


def future_returns(
    gaps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float
) -> Float[Tensor, "B T"]:
    """G_t = Σ_{t'>t} γ^(t'−t) g_t', strictly future: token t does not change the gap before it."""
    gaps = gaps * mask
    returns = torch.zeros_like(gaps)
    for t in range(gaps.shape[1] - 2, -1, -1):
        returns[:, t] = gamma * (gaps[:, t + 1] + returns[:, t + 1])
    return returns * mask


def normalized_returns(
    gaps: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float
) -> Float[Tensor, "B T"]:
    """R_t = G_t / Σ_{k=1..T−t} γ^k, T the row's own length: the mean gap to come.

    The divisor is G_t of gaps that are all 1. A row's last token has no future: R = 0.
    """
    horizon = future_returns(torch.ones_like(gaps), mask, gamma)
    return torch.where(horizon > 0, future_returns(gaps, mask, gamma) / horizon.clamp_min(1e-30), 0.0)


def leave_one_out(
    returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """b_t: the mean of the returns at the same t over the *other* rows of the group.

    A member that has ended counts 0 and stays in the mean. Rows that are alone in their
    group, rows of group −1 (text that no group sampled) and rows without any token are
    left alone: b = 0. Independent of the row's own tokens, so it adds no bias.
    """
    member = (mask.any(dim=1) & (group >= 0)).to(returns.dtype)
    own = returns * mask * member[:, None]
    _, index = group.unique(return_inverse=True)
    total = torch.zeros_like(own).index_add_(0, index, own)[index]
    num_others = torch.zeros_like(member).index_add_(0, index, member)[index] - 1
    baseline = (total - own) / num_others.clamp_min(1)[:, None]
    return torch.where((num_others >= 1)[:, None] & mask & (member > 0)[:, None], baseline, 0.0)


def advantages(
    gaps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    gamma: float,
    *,
    normalize: bool = True,
) -> Float[Tensor, "B T"]:
    """A_t = R_t − b_t, detached: what the long-horizon term multiplies ∇log π(a_t) with.

    ``normalize`` true is the practical form (R); false the exact one (G), in which the
    caller also weighs position t by γ^t.
    """
    gaps = gaps.detach()
    returns = (normalized_returns if normalize else future_returns)(gaps, mask, gamma)
    return returns - leave_one_out(returns, mask, group)
