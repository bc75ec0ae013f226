"""Returns, baselines and advantages against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill import credit

LENGTHS = [4, 2, 1, 5, 3, 4]
GROUP = torch.tensor([5, 5, 5, 0, 0, -1])
GAMMA = 0.8


def padded() -> tuple[Tensor, Tensor]:
    gaps = torch.randn(len(LENGTHS), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5)[None, :] < torch.tensor(LENGTHS)[:, None]
    return gaps, mask  # what lies behind a row's end is not 0: it must not be read


def slow_return(gaps: list[float], t: int) -> float:
    return sum(GAMMA ** (later - t) * gaps[later] for later in range(t + 1, len(gaps)))


def slow_normalized(gaps: list[float], t: int) -> float:
    horizon = sum(GAMMA**k for k in range(1, len(gaps) - t))
    return slow_return(gaps, t) / horizon if horizon else 0.0


def rows_of(gaps: Tensor) -> list[list[float]]:
    return [gaps[i, :length].tolist() for i, length in enumerate(LENGTHS)]


def test_returns_are_strictly_future():
    gaps, mask = padded()
    got, normalized = (fn(gaps, mask, GAMMA) for fn in (credit.future_returns, credit.returns))
    for i, row in enumerate(rows_of(gaps)):
        for t in range(5):
            inside = t < len(row)
            assert abs(got[i, t] - (slow_return(row, t) if inside else 0)) < 1e-12
            assert abs(normalized[i, t] - (slow_normalized(row, t) if inside else 0)) < 1e-12


def test_the_normalized_return_of_equal_gaps_is_the_gap():
    _, mask = padded()
    got = credit.returns(torch.full((6, 5), 0.3, dtype=torch.float64), mask, GAMMA)
    assert ((got - 0.3).abs() < 1e-12)[:, :-1][mask[:, 1:]].all()


def test_advantages_leave_the_row_itself_out():
    gaps, mask = padded()
    rows = rows_of(gaps)
    got = credit.advantages(gaps, mask, GROUP, GAMMA)
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i and GROUP[j] == GROUP[i] and GROUP[i] >= 0]
        for t in range(5):
            if t >= len(row):
                assert got[i, t] == 0
                continue
            ended_count_zero = [slow_normalized(rows[j], t) if t < len(rows[j]) else 0.0 for j in others]
            baseline = sum(ended_count_zero) / len(others) if others else 0.0
            assert abs(got[i, t] - (slow_normalized(row, t) - baseline)) < 1e-12


def test_spans_and_divisors():
    costs, mask = padded()
    for i, row in enumerate(rows_of(costs)):
        for t, cost in enumerate(row):
            future, left = slow_return(row, t), len(row) - t
            expected = {
                ("own", "none"): cost, ("own", "discount"): cost, ("own", "length"): cost,
                ("future", "none"): future, ("future", "length"): future / (left - 1) if left > 1 else 0,
                ("all", "none"): cost + future, ("all", "length"): (cost + future) / left,
                ("all", "discount"): (cost + future) / sum(GAMMA**k for k in range(left)),
            }  # fmt: skip
            for (span, normalize), value in expected.items():
                got = credit.returns(costs, mask, GAMMA, span=span, normalize=normalize)
                assert abs(got[i, t] - value) < 1e-12, (span, normalize)


@pytest.mark.parametrize("cost_of", ["state", "token"])
def test_ratios_reweigh_the_continuation_to_the_current_policy(cost_of):
    """Sums of costs, each with the ratios of what it depends on. A token that the loss leaves out costs
    nothing, and its ratio is 1."""
    costs, mask = padded()
    mask[0, 1] = mask[3, 2] = False
    ratios = torch.rand(costs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    ratios = torch.where(mask, ratios, 1.0)
    got = credit.returns(costs, mask, GAMMA, normalize="none", ratios=ratios, cost_of=cost_of)
    before = credit.products_before(ratios)
    own = int(cost_of == "token")
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            expected = sum(
                GAMMA ** (k - t) * float(ratios[i, t + 1 : k + own].prod() * costs[i, k] * mask[i, k])
                for k in range(t + 1, length)
            )
            assert abs(got[i, t] - expected * float(mask[i, t])) < 1e-12
            assert abs(before[i, t] - ratios[i, :t].prod()) < 1e-12


@pytest.mark.parametrize("span", ["future", "own", "all"])
@pytest.mark.parametrize("normalize", ["discount", "length", "none"])
@pytest.mark.parametrize("cost_of", ["state", "token"])
def test_ratios_of_one_change_nothing(span, normalize, cost_of):
    costs, mask = padded()
    mask[0, 1] = mask[3, 2] = False
    settings = {"span": span, "normalize": normalize}
    got = credit.returns(costs, mask, GAMMA, ratios=torch.ones_like(costs), cost_of=cost_of, **settings)
    torch.testing.assert_close(got, credit.returns(costs, mask, GAMMA, **settings))


def minillm_advantages(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """What the code published with MiniLLM computes (losses.py, `_get_advantages_and_returns`), in
    loops: the discounted rewards from the token on, by the tokens that are left, whitened."""
    num_rows, length = rewards.shape
    found = torch.zeros_like(rewards)
    for i in range(num_rows):
        for t in range(length):
            total = sum(gamma ** (k - t) * float(rewards[i, k]) for k in range(t, length))
            left = int(mask[i, t:].sum())
            found[i, t] = total / max(left, 1)
    return (found - found.mean()) * torch.rsqrt(found.var(unbiased=False) + 1e-8)


def test_minillms_advantage():
    """Without padding, where their whitening sees no positions that are not there."""
    costs = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = torch.ones(6, 5, dtype=torch.bool)
    got = credit.advantages(costs, mask, GROUP, 0.95, span="all", normalize="length", baseline="whiten")
    torch.testing.assert_close(-got, minillm_advantages(-costs, mask, 0.95))


def test_whitening_uses_only_real_tokens():
    costs, mask = padded()
    got = credit.advantages(costs, mask, GROUP, GAMMA, span="own", baseline="whiten")
    inside = got[mask]
    assert abs(inside.mean()) < 1e-9
    assert abs(inside.var(unbiased=False) - 1) < 1e-6
    assert not got[~mask].any()


def test_whitening_one_token_or_equal_ones_gives_zero():
    mask = torch.tensor([[True, False], [False, False]])
    assert torch.equal(credit.whiten(torch.tensor([[3.0, 7.0], [1.0, 2.0]]), mask), torch.zeros(2, 2))
    assert torch.equal(credit.whiten(torch.full((2, 2), 3.0), torch.ones(2, 2).bool()), torch.zeros(2, 2))


def test_a_member_without_tokens_does_not_count():
    returns = torch.tensor([[2.0, 2.0], [4.0, 4.0], [9.0, 9.0]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    found = credit.leave_one_out(returns, mask, torch.zeros(3, dtype=torch.long))
    assert found.tolist() == [[4.0, 4.0], [2.0, 2.0], [0.0, 0.0]]


def test_a_row_alone_or_without_group_has_no_baseline():
    gaps, mask = padded()
    returns = credit.returns(gaps, mask, GAMMA)
    alone = torch.arange(6)
    torch.testing.assert_close(credit.advantages(gaps, mask, alone, GAMMA), returns)
    torch.testing.assert_close(credit.advantages(gaps, mask, torch.full((6,), -1), GAMMA), returns)
    empty = mask.clone()
    empty[1:3] = False  # members without any token are no members
    got = credit.advantages(gaps, empty, GROUP, GAMMA)
    torch.testing.assert_close(got[0], returns[0])


def test_rows_and_back():
    gaps, mask = padded()
    row, step = mask.nonzero(as_tuple=True)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(1))
    rows, got_mask = credit.to_rows(gaps[row, step][order], row[order], step[order], len(gaps))
    assert (got_mask == mask).all()
    torch.testing.assert_close(rows, gaps * mask)
    filled, _ = credit.to_rows(gaps[row, step], row, step, len(gaps), fill=1.0)
    torch.testing.assert_close(filled, torch.where(mask, gaps, 1.0))
    none = torch.zeros(0, dtype=torch.int64)
    assert credit.to_rows(torch.zeros(0), none, none, 3)[0].shape == (3, 0)
    nothing = credit.advantages(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool), GROUP[:3], GAMMA)
    assert nothing.shape == (3, 0)
