"""Frontiers at known distances from each other."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.study.measure.measures_file import TEMPERATURES, Measures, measures_table
from deploy.study.tables.frontier import frontier_difference
from deploy.study.tables.statistics import Comparison, compare


def gain_of(pairs: list[tuple[Measures, Measures]], score: str, *, num_draws: int) -> Comparison:
    return compare([frontier_difference(pair, score, num_draws=num_draws) for pair in pairs])


def measures(entropies: list[float], score: float, slope: float = -0.1, num_prompts: int = 50) -> Measures:
    """Measures whose score per prompt is ``score + slope·entropy`` plus noise that two recipes share."""
    noise = np.random.default_rng(0).normal(0, 0.2, num_prompts)
    noise -= noise.mean()
    columns = {}
    for temperature, entropy in zip(TEMPERATURES, entropies, strict=True):
        lengths = np.arange(1, num_prompts + 1.0)
        columns[f"t{temperature:g}.entropy.sum"] = entropy * lengths
        columns[f"t{temperature:g}.entropy.weight"] = lengths
        columns[f"t{temperature:g}.rouge_l.teacher.sum"] = score + slope * entropy + noise
        columns[f"t{temperature:g}.rouge_l.teacher.weight"] = np.ones(num_prompts)
    return Measures(measures_table(columns, {"t1.distinct_2": 0.5}, "texts-of-0"))


def test_a_sharper_student_on_the_same_frontier_gains_nothing():
    ours, theirs = measures([1.0, 2.0, 3.0, 3.5], 1.0), measures([2.0, 3.0, 4.0, 5.0], 1.0)
    assert ours.value("t0.5.rouge_l.teacher") > theirs.value("t0.5.rouge_l.teacher")
    gain = gain_of([(ours, theirs)], "rouge_l.teacher", num_draws=50)
    assert gain.difference == pytest.approx(0, abs=1e-12)
    assert gain.low == pytest.approx(0, abs=1e-9) and gain.high == pytest.approx(0, abs=1e-9)


def test_a_higher_frontier_gains_over_the_shared_entropies():
    ours, theirs = measures([1.0, 2.0, 3.0, 3.5], 1.03), measures([2.0, 3.0, 4.0, 5.0], 1.0)
    gain = gain_of([(ours, theirs)] * 2, "rouge_l.teacher", num_draws=50)
    assert gain.difference == pytest.approx(0.03)
    assert gain.low > 0.029 and gain.p_value < 0.05
    assert ours.value("t1.distinct_2") == 0.5


def test_frontiers_that_share_no_entropy_are_not_compared():
    apart = [(measures([1.0, 1.1, 1.2, 1.3], 1.0), measures([2.0, 3.0, 4.0, 5.0], 1.0))]
    found = gain_of(apart, "rouge_l.teacher", num_draws=50)
    assert np.isnan(found.difference) and np.isnan(found.low)
    assert found.p_value == 1, "recipes that cannot be compared do not differ significantly"
