"""Differences between two recipes within a seed, computed from their run folders.

Each difference comes with its standard error over prompts, so that the tables can be made from
``results.json`` alone. The per-prompt sums stay in the run folders, which are large and remain on the
machine that made them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.study.measure.measures_file import FRONTIER_SCORES, TEXT_MEASURES, Measures, measures_path
from deploy.study.tables.frontier import frontier_difference
from deploy.study.tables.statistics import PairedPrompts, SeedDifference, seed_difference
from distill.evaluation import Evaluation, load_evaluation
from distill.run.folder import RunFolder

FRONTIER = "frontier "
"""Prefix of a score's name in the metric of a frontier's gain."""


def differences(
    run_dirs: Mapping[int, Mapping[str, Path]],
    pairs: Sequence[tuple[str, str]],
    metrics: Sequence[str],
    *,
    texts: bool,
) -> list[dict[str, Any]]:
    """One row for each seed, pair and metric.

    ``run_dirs``: seed -> recipe -> its run; pairs that are incomplete in a seed are left out. ``texts``:
    whether to compare the measures of the students' texts too.

    Raises: ValueError when two recipes of a seed were not evaluated on the same prompts.
    """
    rows = []
    for seed, by_recipe in run_dirs.items():
        for ours, theirs in pairs:
            if ours in by_recipe and theirs in by_recipe:
                both = by_recipe[ours], by_recipe[theirs]
                found = dict(_evaluation_differences(*both, metrics)) | (
                    dict(_text_differences(*both)) if texts else {}
                )
                rows += [
                    {"seed": seed, "recipe": ours, "from": theirs, "metric": metric,
                     "difference": _rounded(each.difference), "error": _rounded(each.error)}
                    for metric, each in found.items()
                ]  # fmt: skip
    return rows


def _evaluation_differences(
    ours: Path, theirs: Path, metrics: Sequence[str]
) -> Iterator[tuple[str, SeedDifference]]:
    both = [load_evaluation(RunFolder(path).evaluation("after")) for path in (ours, theirs)]
    for metric in metrics:
        yield metric, seed_difference(_paired(both[0], both[1], metric))


def _paired(ours: Evaluation, theirs: Evaluation, metric: str) -> PairedPrompts:
    if not np.array_equal(ours.prompt_indices, theirs.prompt_indices):
        raise ValueError("two recipes of a seed must be evaluated on the same prompts")
    return PairedPrompts.of(ours.per_prompt(metric), theirs.per_prompt(metric))


def _text_differences(ours: Path, theirs: Path) -> Iterator[tuple[str, SeedDifference]]:
    both = Measures.load(measures_path(ours)), Measures.load(measures_path(theirs))
    for name in TEXT_MEASURES:
        yield name, seed_difference(PairedPrompts.of(*(measures.per_prompt(name) for measures in both)))
    for score in FRONTIER_SCORES:
        yield FRONTIER + score, frontier_difference(both, score)


def _rounded(value: float) -> float | None:
    """None for what is not finite, because JSON cannot represent it."""
    return round(value, 8) if math.isfinite(value) else None
