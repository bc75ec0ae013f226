"""Paired comparisons of two recipes: bootstrap over seeds and prompts, Holm's correction.

Within a seed both recipes answer the same held-out prompts, so prompts are drawn in pairs; seeds
are drawn around them, since another seed is another split, another start and other samples. With
three seeds the outer draw is coarse: the intervals are as honest as three seeds allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    """Lower end of the 95 % percentile interval."""
    high: float
    p_value: float
    """Twice the share of draws on the other side of 0; at least 1 / the number of draws."""


def compare(seeds: Sequence[PairedPrompts], *, num_draws: int = 4000, seed: int = 0) -> Comparison:
    """Draw seeds with replacement, and prompts with replacement within each drawn seed."""
    random = np.random.default_rng(seed)
    drawn = np.stack([_draws(pair, num_draws, random) for pair in seeds])  # [seeds, draws]
    return summarise(float(np.mean([pair.difference() for pair in seeds])), drawn, random)


def summarise(difference: float, drawn: np.ndarray, random: np.random.Generator) -> Comparison:
    """Interval and p of a difference from its draws [seeds, draws], one seed's prompts drawn in each row.

    A draw that is not a number makes the interval NaN and p 1: nothing is claimed.
    """
    num_seeds, num_draws = drawn.shape
    choice = random.integers(num_seeds, size=(num_seeds, num_draws))
    means = np.take_along_axis(drawn, choice, axis=0).mean(0)
    low, high = np.quantile(means, [0.025, 0.975])
    beyond = 0.5 if np.isnan(means).any() else min((means <= 0).mean(), (means >= 0).mean())
    return Comparison(
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=float(min(1.0, max(2 * beyond, 1 / num_draws))),
    )


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
