"""Credit of a token for the costs that follow it: returns, baseline, advantage, ratios.

``learner.update.credit_step`` calls it between the critic steps and the student step, without gradients.
By convention, costs are padded to ``[B, T]``: row i contains the cost at response token t (the moment
gap before it, or the cost of the token itself), with a mask that is true where the row has a token.
:func:`to_rows` scatters flat positions into this form. Entries where the mask is false count 0, so
everything after a row's end is 0.

*Importance ratios* r_u = π(a_u)/μ(a_u) correct text that an older policy μ wrote. They are padded like
costs, but are 1 where the mask is false: a token that the loss leaves out, because the policy did not
choose it, is as likely under both policies.

Legend: B rows, T longest response, N positions. t counts from 0, in G_t and R_t as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def to_rows(
    values: Float[Tensor, " N"],
    row: Int[Tensor, " N"],
    step: Int[Tensor, " N"],
    num_rows: int,
    *,
    fill: float = 0.0,
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Scatter flat positions to ``[B, T]``; the mask marks where they are.

    ``rows[row, step]`` is the inverse. ``fill``: the value elsewhere.
    """
    length = int(step.max()) + 1 if len(step) else 0
    rows = values.new_full((num_rows, length), fill)
    mask = torch.zeros(num_rows, length, dtype=torch.bool, device=values.device)
    rows[row, step] = values
    mask[row, step] = True
    return rows, mask


Span = Literal["future", "own", "all"]
"""The costs that a token gets credit for: those of later tokens, its own, or both."""

Normalize = Literal["discount", "length", "none"]
"""The divisor of a return: the sum of its discounts, the number of its tokens, or 1."""

CostOf = Literal["state", "token"]
"""What c_t depends on: the state before token t (its moment gap), or the token as well (its log-ratio)."""


def future_returns(
    costs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], gamma: float
) -> Float[Tensor, "B T"]:
    """G_t = Σ_{t'>t} γ^(t'−t) c_t', strictly future: token t does not change the gap before it."""
    costs = costs * mask
    returns = torch.zeros_like(costs)
    for t in range(costs.shape[1] - 2, -1, -1):
        returns[:, t] = gamma * (costs[:, t + 1] + returns[:, t + 1])
    return returns * mask


def returns(
    costs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    *,
    span: Span = "future",
    normalize: Normalize = "discount",
    ratios: Float[Tensor, "B T"] | None = None,
    cost_of: CostOf = "state",
) -> Float[Tensor, "B T"]:
    """The sum or mean of the costs in a token's span.

    ``normalize``: ``discount`` divides by the sum of the discounts, R_t = G_t / Σ_{k=1..T−1−t} γ^k
    for the future, so that equal costs c give c; ``length`` by the number of tokens in the span;
    T is the row's own length. A span without tokens gives 0 (the future of a row's last token).
    ``ratios``: of text that an older policy wrote, whose continuation after t :func:`_reweighted`
    corrects to the current policy; None: all 1. ``cost_of`` matters only with ratios.
    """
    if span == "own":
        return costs * mask
    if ratios is not None:
        return _reweighted(costs, mask, gamma, span, normalize, ratios, cost_of)
    total = _over_span(costs, mask, gamma, span)
    if normalize == "none":
        return total
    divisor = _over_span(torch.ones_like(costs), mask, gamma if normalize == "discount" else 1.0, span)
    return _quotient(total, divisor)


def _over_span(costs: Tensor, mask: Tensor, gamma: float, span: Span) -> Tensor:
    future = future_returns(costs, mask, gamma)
    return future if span == "future" else costs * mask + future


def _quotient(total: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, total / divisor.clamp_min(1e-30), 0.0)


def _reweighted(
    costs: Tensor,
    mask: Tensor,
    gamma: float,
    span: Span,
    normalize: Normalize,
    ratios: Tensor,
    cost_of: CostOf,
) -> Tensor:
    """The return R_t on text of an older policy μ, with its mean under the current policy π.

    Let M_k be the return of token t if its row ended after token t + k, and M_{−1} = 0. Then
    R_t = Σ_{k>=0} (M_k − M_{k−1}), where the k-th difference is 0 if the row ends before token t + k. It
    depends on the tokens before t + k, which decide whether there is a token t + k and in which state, and
    on token t + k itself if c_{t+k} does. The ratio of the two policies' probabilities of those among them
    that come after t is w_k = Π_{t<u<t+k} r_u, times r_{t+k} if the cost is one of the token. Therefore

        E_μ[ Σ_k w_k (M_k − M_{k−1}) | s_t, a_t ] = E_π[ R_t | s_t, a_t ]

    for every divisor. With none the difference is γ^k c_{t+k}, and this is the sum of
    γ^(t'−t) (Π_{t<u<t'} r_u) [r_t'] c_t'. The ratio of token t itself is left to the caller, who applies it
    to the whole score term.
    """
    found = torch.zeros_like(costs)
    length = costs.shape[1]
    discounts = gamma ** torch.arange(length, dtype=costs.dtype, device=costs.device)
    for t in range(length):
        in_span = mask[:, t:].to(costs.dtype)
        if span == "future":
            in_span[:, 0] = 0
        discounted = in_span * discounts[: length - t]
        added = discounted * costs[:, t:]
        if normalize != "none":
            divisor = discounted if normalize == "discount" else in_span
            so_far = _quotient(added.cumsum(dim=1), divisor.cumsum(dim=1))
            added = so_far.diff(dim=1, prepend=torch.zeros_like(so_far[:, :1]))
        later = torch.cat([torch.ones_like(ratios[:, :1]), ratios[:, t + 1 :]], dim=1)
        weight = products_before(later) if cost_of == "state" else later.cumprod(dim=1)
        found[:, t] = (weight * added).sum(dim=1)
    return found * mask


def leave_one_out(
    returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """b_t: the mean of the returns at the same t over the *other* rows of the group.

    A row that has ended counts 0 and stays in the mean. Rows that are the only one of their group,
    rows of group −1 (text that no group sampled) and rows without any token have b = 0. The baseline
    does not depend on the row's own tokens, so it adds no bias.
    """
    member = (mask.any(dim=1) & (group >= 0)).to(returns.dtype)
    own = returns * mask * member[:, None]
    _, index = group.unique(return_inverse=True)
    total = torch.zeros_like(own).index_add_(0, index, own)[index]
    num_others = torch.zeros_like(member).index_add_(0, index, member)[index] - 1
    baseline = (total - own) / num_others.clamp_min(1)[:, None]
    return torch.where((num_others >= 1)[:, None] & mask & (member > 0)[:, None], baseline, 0.0)


def whiten(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], total: Callable[[Tensor], Tensor] = lambda x: x
) -> Float[Tensor, "B T"]:
    """Whiten to mean 0 and population variance 1 over the tokens: (v − mean) / √(var + 1e-8).

    ``total``: turns a sum into the sum over all ranks, when these are only some of the rows.
    """
    count = total(mask.sum()).clamp_min(1)
    mean = total((values * mask).sum()) / count
    variance = total(((values - mean).square() * mask).sum()) / count
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def advantages(
    costs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    gamma: float,
    *,
    span: Span = "future",
    normalize: Normalize = "discount",
    baseline: Literal["leave_one_out", "whiten", "none"] = "leave_one_out",
    ratios: Float[Tensor, "B T"] | None = None,
    cost_of: CostOf = "state",
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Float[Tensor, "B T"]:
    """A_t = R_t − b_t, detached: the factor of ∇log π(a_t) in the score-function term.

    With costs −(log π* − log π) of the tokens, span ``all``, ``length`` and ``whiten`` this is the
    negative of the advantage in the code published with MiniLLM (Gu et al. 2024), which maximises
    rewards instead of minimising costs.
    """
    found = returns(
        costs.detach(), mask, gamma, span=span, normalize=normalize, ratios=ratios, cost_of=cost_of
    )
    if baseline == "whiten":
        return whiten(found, mask, total)
    return found if baseline == "none" else found - leave_one_out(found, mask, group)


def products_before(ratios: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Π_{u<t} r_u: how much likelier the current policy is to reach step t."""
    return torch.cat([torch.ones_like(ratios[:, :1]), ratios[:, :-1]], dim=1).cumprod(dim=1)
