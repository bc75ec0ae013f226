"""The report of a study, made from its ``results.json``: the runs' folders may be gone.

All results in it come from one version of the method's code, which the introduction names by its hash.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deploy.report.model import Block, Code, Column, Interval, Line, Number, Paragraph, Report, Table
from deploy.study.measure.measures_file import FRONTIER_SCORES, TEXT_MEASURES
from deploy.study.tables.differences import FRONTIER
from deploy.study.tables.run_results import LAST_UPDATES
from deploy.study.tables.statistics import Comparison, SeedDifference, compare, holm
from distill.evaluation import direction

LEVEL = 0.05
"""Of significance: a difference is marked where its adjusted p is below this."""
_CRITIC_METRICS: Mapping[int, Sequence[str]] = {
    1: ("critic/d_mm_off", "critic/d_mm_on", "critic/tightness_off", "critic/tightness_on"),
    2: (
        "critic/teacher_text.d_mm", "critic/student_text.d_mm",
        "critic/teacher_text.tightness", "critic/student_text.tightness",
    ),
}  # fmt: skip
"""By the hash format of the results, which changed when the metrics were renamed."""

Results = Mapping[str, Any]
Run = Mapping[str, Any]
"""An entry of the results' ``runs``."""
Pair = tuple[str, str]
"""A recipe and the recipe that it is compared with."""
Intervals = Mapping[tuple[Pair, str], Interval]
"""By pair and metric."""


def study_report(results: Results) -> Report:
    """The introduction and all tables for which the results have numbers."""
    blocks: list[Block] = [Paragraph(_introduction(results))]
    if results["diverged"]:
        blocks.append(Paragraph(_diverged(results)))
    blocks.append(_final_table(results))
    if results["comparisons"]:
        blocks.append(_comparisons_table(results))
    blocks += [_drift_table(results), _equal_time_table(results)]
    if any(run["critics"] for run in results["runs"]):
        blocks.append(_critics_table(results))
    if all(run["texts"] for run in results["runs"]):
        blocks.append(_texts_table(results))
    return Report(title=f"Study {results['study']}", blocks=tuple(blocks))


def runs_by_recipe(results: Results) -> dict[str, list[Run]]:
    """The runs of each recipe, in the order of the results."""
    found: dict[str, list[Run]] = {}
    for run in results["runs"]:
        found.setdefault(run["recipe"], []).append(run)
    return found


# The introduction


def _introduction(results: Results) -> Line:
    seeds = sorted({run["seed"] for run in results["runs"]})
    over = (
        "over seeds and prompts (docs/studies.md); * where Holm's adjusted p over the column is below "
        f"{LEVEL:g}."
        if len(seeds) > 1
        else "over prompts alone: one seed says nothing about another."
    )
    return (
        "Study ",
        Code(results["study"]),
        " on task ",
        Code(results["task"]),
        f", method {results['method_hash']}, seeds {', '.join(map(str, seeds))}; differences are from ",
        Code(results["baseline"]),
        f", paired by seed and prompt, with 95 % intervals {over}",
    )


def _diverged(results: Results) -> Line:
    line: Line = ()
    for run in results["diverged"]:
        line += (", " if line else "", Code(run["recipe"]), f" seed {run['seed']}")
    return ("Ended with numbers that are not finite, and left out of every table: ", *line, ".")


# The tables


def _final_table(results: Results) -> Table:
    """The metrics after the last update, with their differences from the baseline."""
    metrics = results["metrics"]
    intervals = _from_baseline(results, metrics)
    rows = []
    for recipe, runs in runs_by_recipe(results).items():
        pair = recipe, results["baseline"]
        cells = [
            _with_difference(_mean(run["final"].get(metric, math.nan) for run in runs), intervals.get((pair, metric)))
            for metric in metrics
        ]  # fmt: skip
        rows.append(
            (
                (Code(recipe),),
                (str(len(runs)),),
                (_settings(results["chosen"][recipe]),),
                *cells,
                (Number(_seconds_per_update(runs), digits=2),),
            )
        )
    columns = _columns("recipe", "seeds", "chosen", *map(_heading, metrics), "s per update")
    return Table(columns, tuple(rows))


def _comparisons_table(results: Results) -> Table:
    """The pairs of recipes that the study compares in addition to those with the baseline."""
    metrics = results["metrics"]
    pairs = [(ours, theirs) for ours, theirs in results["comparisons"]]
    intervals = _intervals(results, pairs, metrics)
    rows = [
        ((Code(pair[0]), " − ", Code(pair[1])), *((intervals[pair, metric],) for metric in metrics))
        for pair in dict.fromkeys(pair for pair, _ in intervals)
    ]
    return Table(_columns("", *map(_heading, metrics)), tuple(rows), title="Further differences")


def _drift_table(results: Results) -> Table:
    """TV in the first and last third of responses, on both texts."""
    names = [f"{text}_text.tv_{part}" for text in ("teacher", "student") for part in ("early", "late")]
    rows = []
    for recipe, runs in runs_by_recipe(results).items():
        # Responses of fewer than three tokens have no thirds.
        values = [_mean(run["final"].get(name, math.nan) for run in runs) for name in names]
        growth = [Number(late / early, digits=3) for early, late in (values[:2], values[2:])]
        rows.append(((Code(recipe),), *((Number(value),) for value in values), *((each,) for each in growth)))
    ratios = ("teacher text: late / early", "student text: late / early")
    return Table(
        _columns("recipe", *map(_heading, names), *ratios),
        tuple(rows),
        title="Early against late",
        note="TV in the first and last third of responses, and the last over the first. Above 1 on "
        "the student's text and not on the teacher's: it drifts.",
    )


def _equal_time_table(results: Results) -> Table:
    """Every metric after as many seconds of training as the fastest run took in all."""
    metrics = results["metrics"]
    budget = min(run["evaluations"][-1]["train_s"] for run in results["runs"])
    rows = []
    for recipe, runs in runs_by_recipe(results).items():
        updates, *values = np.mean([_at_time(run["evaluations"], budget, metrics) for run in runs], axis=0)
        numbers = [Number(updates, digits=0), *map(Number, values)]
        rows.append(((Code(recipe),), *(() if np.isnan(updates) else (number,) for number in numbers)))
    return Table(
        _columns("recipe", "updates by then", *map(_heading, metrics)),
        tuple(rows),
        title="At equal time",
        note=f"after {budget:.0f} s of training (a proxy's counts; evaluations do not, nor the writing of the "
        "teacher's texts, once for all), interpolated in the logarithm of time between a run's evaluations, "
        "on the prompts that they share; empty where that is before the first. The slower recipes are read "
        "before their learning rate has come down, and runs shared the machine, so this is rough.",
    )


def _critics_table(results: Results) -> Table:
    """d_MM and tightness on batches before a critic's step on them."""
    names = _CRITIC_METRICS[results.get("hash_format", 1)]
    rows = []
    for recipe, runs in runs_by_recipe(results).items():
        critics = [run["critics"] for run in runs]
        if any(critics):
            measured = [all(name in metrics for metrics in critics) for name in names]
            rows.append(
                (
                    (Code(recipe),),
                    *(
                        (Number(_mean(metrics[name] for metrics in critics), digits=3),) if there else ()
                        for name, there in zip(names, measured, strict=True)
                    ),
                )
            )
    return Table(
        _columns("recipe", *(_words(name.split("/")[1]) for name in names)),
        tuple(rows),
        title=f"Learned critics, means over the last {LAST_UPDATES} updates, each measured on positions before "
        "the critic's step on them",
        note="d_MM is the moment gap that the critic finds, tightness its share of what the regularised "
        "game's optimum finds there.",
    )


def _texts_table(results: Results) -> Table:
    """Measures of the students' texts, and how far their frontiers are above the baseline's."""
    gains = [FRONTIER + score for score in FRONTIER_SCORES]
    intervals = _from_baseline(results, [*TEXT_MEASURES, *gains])
    rows: list[tuple[Line, ...]] = []
    for recipe, runs in runs_by_recipe(results).items():
        found = {name: intervals.get(((recipe, results["baseline"]), name)) for name in (*TEXT_MEASURES, *gains)}  # fmt: skip
        rows.append(
            (
                (Code(recipe),),
                *(_with_difference(_mean(run["texts"][name] for run in runs), found[name]) for name in TEXT_MEASURES),
                *((gain,) if (gain := found[name]) else () for name in gains),
                _distinct([run["texts"] for run in runs]),
            )
        )  # fmt: skip
    if results["teacher"]:
        texts = [of_seed["texts"] for of_seed in results["teacher"]]
        ceiling = [(Number(_mean(each[name] for each in texts)),) for name in TEXT_MEASURES]
        rows.append((("the teacher itself",), *ceiling, *(() for _ in gains), _distinct(texts)))
    names = [name.replace("_", " ") for name in TEXT_MEASURES]
    return Table(
        _columns("recipe", *names, *gains, "distinct 1, 2, 3"),
        tuple(rows),
        title="What the students write",
        note="entropy and the teacher's log-probability of it (nats per token, temperature 1), accuracy of a "
        "classifier that tells it from the teacher's (0.5 is best), bits per byte of the references, TV of the "
        "student read at temperature 0.9; then how far the score lies above the baseline's at equal entropy "
        "(temperatures 0.5 to 1); shares of distinct 1-, 2- and 3-grams. The teacher's row: other texts of its "
        "own in a student's place.",
    )


# Differences between recipes


def _from_baseline(results: Results, metrics: Sequence[str]) -> Intervals:
    return _intervals(results, [(recipe, results["baseline"]) for recipe in runs_by_recipe(results)], metrics)


def _intervals(results: Results, pairs: Iterable[Pair], metrics: Sequence[str]) -> Intervals:
    """Over the seeds that have both recipes; Holm's correction is over the pairs of a metric."""
    compared = _compared(results, pairs, metrics)
    found: dict[tuple[Pair, str], Interval] = {}
    for metric in metrics:
        column = {pair: by_metric[metric] for pair, by_metric in compared.items() if metric in by_metric}
        adjusted = holm([each.p_value for each in column.values()])
        for (pair, each), p_value in zip(column.items(), adjusted, strict=True):
            found[pair, metric] = Interval(each.difference, each.low, each.high, p_value < LEVEL)
    return found


def _compared(
    results: Results, pairs: Iterable[Pair], metrics: Sequence[str]
) -> dict[Pair, dict[str, Comparison]]:
    seeds: dict[Pair, dict[str, list[SeedDifference]]] = {}
    for row in results["differences"]:
        values = (math.nan if row[name] is None else row[name] for name in ("difference", "error"))
        by_metric = seeds.setdefault((row["recipe"], row["from"]), {})
        by_metric.setdefault(row["metric"], []).append(SeedDifference(*values))
    return {
        pair: {metric: compare(seeds[pair][metric]) for metric in metrics if metric in seeds[pair]}
        for pair in pairs
        if pair in seeds
    }


# Numbers of runs


def _at_time(evaluations: Sequence[Mapping[str, Any]], seconds: float, metrics: Sequence[str]) -> list[float]:
    """[update, *metrics] after so much training; NaN before the first evaluation after training began.

    Distances fall fast at first, so a straight line from the start would be far above them.
    """
    after = [point for point in evaluations if point["update"] > 0]
    if not after or seconds < after[0]["train_s"]:
        return [math.nan] * (1 + len(metrics))
    at = np.log([point["train_s"] for point in after])
    columns = [[point["update"] for point in after]]
    columns += [[point["values"][metric] for point in after] for metric in metrics]
    return [float(np.interp(math.log(seconds), at, column)) for column in columns]


def _seconds_per_update(runs: Sequence[Run]) -> float:
    """The median over the runs."""
    seconds = []
    for run in runs:
        first, last = run["evaluations"][0], run["evaluations"][-1]  # before the first: a proxy's training
        seconds.append((last["train_s"] - first["train_s"]) / max(last["update"], 1))
    return float(np.median(seconds))


def _distinct(texts: Collection[Mapping[str, float]]) -> Line:
    """The shares of distinct 1-, 2- and 3-grams."""
    one, two, three = (
        Number(_mean(each[f"t1.distinct_{length}"] for each in texts), digits=3) for length in (1, 2, 3)
    )
    return one, ", ", two, ", ", three


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


# Cells


def _with_difference(value: float, interval: Interval | None) -> Line:
    return (Number(value),) if interval is None else (Number(value), " (", interval, ")")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.split('.')[-1]} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in settings.items()
    )


def _columns(*headings: str) -> tuple[Column, ...]:
    """The first column names the row; the others have numbers."""
    return tuple(Column(heading, numeric=number > 0) for number, heading in enumerate(headings))


def _heading(metric: str) -> str:
    arrow = {1: " ↑", -1: " ↓"}.get(direction(metric), "")
    return _words(metric) + arrow


def _words(metric: str) -> str:
    return metric.replace("_text.", " text: ").replace("_", " ")
