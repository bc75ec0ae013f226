"""What every benchmark shares: pairs of measurements taken in one run, and the ratios that they have.

A ratio is ours divided by theirs, and both numbers of a pair come from the same minute of the same machine. Only
such ratios carry over to another day or another machine; the numbers themselves do not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from distill.errors import DistillError

FEWEST_PAIRS, MOST_PAIRS = 3, 5
"""A median of fewer pairs follows a single outlier, and more pairs take longer than they add."""

TOLERATED_FALL = 0.1
"""Share by which a median may be worse than a stored one: two quiet runs of one commit differ by less."""

Pair = tuple[float, float]
"""(ours, theirs), in the same unit."""

Measured = TypeVar("Measured")


class BenchmarkFailed(DistillError, RuntimeError):
    """A benchmark that could not measure."""

    code = "benchmark"


@dataclass(frozen=True, kw_only=True)
class Label:
    """One ratio of a benchmark: what it compares, and what it must reach."""

    meaning: str
    """Ours and theirs in words, for tables."""
    goal: float | None = None
    """None: the ratio is reported and has no goal."""
    at_least: bool = True
    """Whether the median must be at least the goal. False for a ratio of times, which must be at most the goal."""

    def is_met(self, median: float) -> bool:
        """Whether a median reaches the goal."""
        if self.goal is None:
            return True
        return median >= self.goal if self.at_least else median <= self.goal

    @property
    def bound(self) -> str:
        """The goal in words."""
        if self.goal is None:
            return "no goal"
        return f"at {'least' if self.at_least else 'most'} {self.goal:g}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a benchmark measured."""

    pairs: Mapping[str, Sequence[Pair]]
    """Label -> its pairs, in the order in which they were taken."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Numbers beside the ratios, such as bytes of memory. Names have units; there are no paths in it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of packages outside this environment, by the package's name."""


Say = Callable[[str], None]
"""Prints a line of progress."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """An entry of the registry. The module is imported when the benchmark runs."""

    description: str
    """One line for the list of benchmarks."""
    labels: Mapping[str, Label]
    module: str
    """Its function ``measure(num_pairs: int, say: Say) -> Measurement`` measures."""
    num_pairs: int = MOST_PAIRS

    @property
    def goals(self) -> dict[str, float]:
        """The labels that have a goal."""
        return {name: label.goal for name, label in self.labels.items() if label.goal is not None}


@dataclass(frozen=True)
class Ratio:
    """ours / theirs over the pairs of a label."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Ratio:
        """Raises: BenchmarkFailed when there is no pair, or a number that is not positive and finite."""
        ratios = []
        for ours, theirs in pairs:
            if not (0 < ours < float("inf") and 0 < theirs < float("inf")):
                raise BenchmarkFailed("pair", (ours, theirs), "consist of two positive, finite numbers")
            ratios.append(ours / theirs)
        if not ratios:
            raise BenchmarkFailed("number of pairs", 0, "be at least 1")
        return cls(min(ratios), statistics.median(ratios), max(ratios))


def alternate(
    num_rounds: int, sides: Mapping[str, Callable[[], Measured]], say: Say = lambda line: None
) -> list[dict[str, Measured]]:
    """Measure every side once per round; returns side -> result for each round.

    The order of the sides is reversed in every second round, so that a machine that becomes slower, or a cache
    that the first side fills, favours neither side.
    """
    rounds = []
    for number in range(num_rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        found = {}
        for name in order:
            say(f"round {number + 1} of {num_rounds}: {name}")
            found[name] = sides[name]()
        rounds.append({name: found[name] for name in sides})
    return rounds


def rates(rounds: Sequence[Mapping[str, Mapping[str, float]]], ours: str, theirs: str) -> list[Pair]:
    """The pairs of two sides whose rounds return ``num_tokens`` and ``seconds``: tokens per second."""
    return [
        (
            found[ours]["num_tokens"] / found[ours]["seconds"],
            found[theirs]["num_tokens"] / found[theirs]["seconds"],
        )
        for found in rounds
    ]
