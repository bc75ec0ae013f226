"""Compares two recipes by their frontiers: the score as a function of the entropy.

A sharper student scores higher for free. Its frontier is the curve through (entropy, score) at several
sampling temperatures; a recipe gains as far as its curve is above the baseline's at equal entropy.
"""

from __future__ import annotations

import numpy as np

from deploy.study.measure.measures_file import TEMPERATURES, Measures
from deploy.study.tables.statistics import NUM_DRAWS, SeedDifference, prompt_counts


def frontier_difference(
    pair: tuple[Measures, Measures], score: str, *, num_draws: int = NUM_DRAWS
) -> SeedDifference:
    """How far the recipe's frontier is above the baseline's in one seed. ``pair``: (recipe, baseline).

    This is the difference between the two piecewise linear curves score(entropy), averaged over the
    entropies that both reach. The error is by bootstrap over prompts in pairs. NaN where the curves share
    no entropy.
    """
    gain = _gain(*(_curves(measures, score, None) for measures in pair))[0]
    counts = prompt_counts(pair[0].table.num_rows, num_draws, np.random.default_rng(0))
    drawn = _gain(*(_curves(measures, score, counts) for measures in pair))
    return SeedDifference(float(gain), float(drawn.std(ddof=1)))


def _curves(measures: Measures, score: str, counts: np.ndarray | None) -> np.ndarray:
    """[draws, temperatures, 2]: entropy and score, prompts weighted by ``counts`` [draws, m]."""
    if counts is None:
        counts = np.ones((1, measures.table.num_rows))
    points = []
    for temperature in sorted(TEMPERATURES):
        pair = []
        for name in ("entropy", score):
            sums, weights = measures.per_prompt(f"t{temperature:g}.{name}")
            pair.append((counts @ sums) / (counts @ weights))
        points.append(np.stack(pair, axis=-1))
    return np.stack(points, axis=1)


def _gain(recipe: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """[draws]: mean difference of two curves [draws, points, 2] over the entropies of both."""
    gains = []
    for ours, theirs in zip(recipe, baseline, strict=True):
        low, high = max(ours[:, 0].min(), theirs[:, 0].min()), min(ours[:, 0].max(), theirs[:, 0].max())
        if low > high:
            gains.append(np.nan)
            continue
        at = np.linspace(low, high, 33)
        curves = [np.interp(at, *curve[np.argsort(curve[:, 0])].T) for curve in (ours, theirs)]
        gains.append(float((curves[0] - curves[1]).mean()))
    return np.array(gains)
