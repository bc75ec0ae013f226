"""The coverage of intervals, and Holm's procedure against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.study.tables import statistics
from deploy.study.tables.statistics import Comparison, PairedPrompts, holm, seed_difference


def seeds(effect: float, *, num_seeds: int = 5, num_prompts: int = 60, seed: int = 0) -> list[PairedPrompts]:
    """Prompts of unequal length whose spread, which both recipes share, is far larger than the effect."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(num_seeds):
        weights = random.integers(1, 9, size=num_prompts).astype(float)
        shared = random.normal(size=num_prompts)
        values = np.stack([shared + effect, shared]) + 0.1 * random.normal(size=(2, num_prompts))
        found.append(PairedPrompts(sums=values * weights, weights=np.stack([weights, weights])))
    return found


def compare(pairs: list[PairedPrompts], *, num_draws: int = 1000) -> Comparison:
    random = np.random.default_rng(0)
    return statistics.compare([seed_difference(pair, num_draws=num_draws, random=random) for pair in pairs])


def test_the_difference_is_the_mean_over_seeds_of_the_ratios_difference():
    pairs = seeds(0.3)
    expected = np.mean(
        [p.sums[0].sum() / p.weights[0].sum() - p.sums[1].sum() / p.weights[1].sum() for p in pairs]
    )
    found = compare(pairs)
    assert found.difference == pytest.approx(expected)
    assert found.low < found.difference < found.high


def test_pairing_detects_effects_smaller_than_the_spread_of_prompts():
    found = compare(seeds(0.05))
    assert found.low > 0 and found.p_value < 0.01
    assert compare(seeds(-0.05)).high < 0
    nothing = compare(seeds(0.0))
    assert nothing.low < 0 < nothing.high and nothing.p_value > 0.05


@pytest.mark.parametrize(("between", "most"), [(0.0, 100), (0.1, 99)])
def test_intervals_have_their_nominal_coverage(between, most):
    """At 95 % or a little more with three seeds, whether or not the effect varies between seeds."""
    found = []
    for number in range(200):
        random = np.random.default_rng(1000 + number)
        pairs = [
            seeds(0.02 + between * random.normal(), num_seeds=1, num_prompts=30, seed=10 * number + i)[0]
            for i in range(3)
        ]
        found.append(compare(pairs, num_draws=50))
    share = np.mean([each.low < 0.02 < each.high for each in found])
    assert 0.91 < share <= most / 100
    assert all((each.p_value < 0.05) == (not each.low < 0 < each.high) for each in found)


def test_one_seed_has_an_interval_over_prompts_and_no_significance():
    found = compare(seeds(0.5, num_seeds=1))
    assert 0 < found.low < found.difference < found.high and found.p_value == 1


def test_seeds_that_disagree_widen_the_interval():
    agree = [*seeds(0.2, num_seeds=2), *seeds(0.2, num_seeds=2, seed=1)]
    disagree = [*seeds(0.4, num_seeds=2), *seeds(0.0, num_seeds=2, seed=1)]
    width = [found.high - found.low for found in (compare(agree), compare(disagree))]
    assert width[1] > 3 * width[0]


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
