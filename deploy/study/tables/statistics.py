"""Paired comparisons of two recipes: over prompts by bootstrap, over seeds by Student's t.

Within a seed both recipes answer the same held-out prompts, so prompts are drawn in pairs. Another
seed is another split, another start and other samples: what a recipe gains differs between seeds by
more than prompts explain. Three seeds drawn with replacement give ten different draws, and three
differences of one sign give an interval that leaves out 0 every fourth time by chance; so the seeds'
own spread is taken with t's quantiles, which is wide with three seeds, and right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

NUM_DRAWS = 1000


@dataclass(frozen=True)
class PairedPrompts:
    """One seed: sums and weights of a metric on the same prompts, of two recipes.

    A metric is a ratio Σ sums / Σ weights over prompts (:mod:`distill.evaluation`).
    """

    sums: np.ndarray
    """[2, m]: of the recipe, of the baseline."""
    weights: np.ndarray
    """[2, m]."""

    @classmethod
    def of(cls, *both: tuple[np.ndarray, np.ndarray]) -> PairedPrompts:
        """From (sums, weights) of the recipe and of the baseline."""
        return cls(*(np.stack(parts) for parts in zip(*both, strict=True)))

    def difference(self) -> float:
        """Recipe minus baseline."""
        values = self.sums.sum(1) / self.weights.sum(1)
        return float(values[0] - values[1])


@dataclass(frozen=True)
class Comparison:
    """Recipe minus baseline, the mean over seeds."""

    difference: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    p_value: float
    """Two-sided; 1 with one seed, which says nothing about another."""


@dataclass(frozen=True)
class SeedDifference:
    """Recipe minus baseline in one seed."""

    difference: float
    error: float
    """Its standard error over prompts."""


def seed_difference(
    pair: PairedPrompts, *, num_draws: int = NUM_DRAWS, random: np.random.Generator | None = None
) -> SeedDifference:
    """Of a metric, by bootstrap over prompts in pairs."""
    draws = _draws(pair, num_draws, random or np.random.default_rng(0))
    return SeedDifference(pair.difference(), float(draws.std(ddof=1)))


def compare(seeds: Sequence[SeedDifference]) -> Comparison:
    """Interval and p from each seed's difference.

    The error of the mean is the seeds' own, s/√S, and no less than what prompts alone give it; t has
    S − 1 degrees of freedom. With one seed: the interval over prompts. What is not a number has no
    interval and p 1: nothing is claimed.
    """
    differences, errors = [each.difference for each in seeds], [each.error for each in seeds]
    num_seeds, mean = len(seeds), float(np.mean(differences))
    error = float(np.sqrt(np.sum(np.square(errors)))) / num_seeds
    if num_seeds == 1:
        reach, p_value = float(norm.ppf(0.975)) * error, 1.0
    else:
        error = max(error, float(np.std(differences, ddof=1)) / num_seeds**0.5)
        reach = float(t.ppf(0.975, num_seeds - 1)) * error
        p_value = float(2 * t.sf(abs(mean) / max(error, 1e-300), num_seeds - 1))
    return Comparison(mean, mean - reach, mean + reach, 1.0 if np.isnan(p_value) else p_value)


def prompt_counts(num_prompts: int, num_draws: int, random: np.random.Generator) -> np.ndarray:
    """[draws, m]: how often each prompt is drawn, with replacement."""
    return random.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_draws)


def _draws(pair: PairedPrompts, num_draws: int, random: np.random.Generator) -> np.ndarray:
    """[draws]: differences on prompts drawn with replacement."""
    counts = prompt_counts(pair.sums.shape[1], num_draws, random)
    values = (counts @ pair.sums.T) / np.maximum(counts @ pair.weights.T, 1e-300)
    return values[:, 0] - values[:, 1]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: reject where the adjusted value is below the level.

    Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
