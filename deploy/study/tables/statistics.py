"""Paired comparisons of two recipes: over prompts by bootstrap, over seeds by Student's t.

Within a seed both recipes answer the same held-out prompts, so the bootstrap draws prompts in pairs. Another
seed means another split, another start and other samples, and a recipe's gain differs between seeds by more
than the choice of prompts explains. A bootstrap over three seeds would have only ten different draws, and
its interval would exclude 0 whenever the three differences have one sign, which happens by chance one time
in four. The spread between seeds is therefore scaled by the quantiles of Student's t, whose intervals are
wide with three seeds and have the right coverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, t

NUM_DRAWS = 1000


@dataclass(frozen=True)
class PairedPrompts:
    """The sums and weights of a metric in one seed, of two recipes on the same prompts.

    A metric is a ratio Σ sums / Σ weights over prompts (:mod:`distill.evaluation`).
    """

    sums: np.ndarray
    """[2, m]: the recipe's and the baseline's."""
    weights: np.ndarray
    """[2, m]."""

    @classmethod
    def of(cls, *both: tuple[np.ndarray, np.ndarray]) -> PairedPrompts:
        """From the (sums, weights) of the recipe and of the baseline."""
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
    """Two-sided; 1 with a single seed, which says nothing about other seeds."""


@dataclass(frozen=True)
class SeedDifference:
    """Recipe minus baseline in one seed."""

    difference: float
    error: float
    """Its standard error over prompts."""


def seed_difference(
    pair: PairedPrompts, *, num_draws: int = NUM_DRAWS, random: np.random.Generator | None = None
) -> SeedDifference:
    """The difference in a metric, with its error by bootstrap over prompts in pairs."""
    draws = _draws(pair, num_draws, random or np.random.default_rng(0))
    return SeedDifference(pair.difference(), float(draws.std(ddof=1)))


def compare(seeds: Sequence[SeedDifference]) -> Comparison:
    """The mean over seeds with its interval and p.

    The error of the mean is that between seeds, s/√S, but no less than the error over prompts; t has S − 1
    degrees of freedom. With a single seed the interval is over prompts. A difference that is not a number
    has no interval, and its p is 1, so that nothing is claimed.
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
    """p-values by Holm's step-down adjustment: reject where the adjusted value is below the level.

    Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
