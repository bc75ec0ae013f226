"""A study's results as Markdown: final values, equal time, what the students write.

Every number in a table comes from runs of one method hash (the results name it), and from the results
alone: the runs' folders may be gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from deploy.study.measure.measures import FRONTIER_SCORES, TEXT_MEASURES
from deploy.study.tables.differences import FRONTIER
from deploy.study.tables.results import LAST_UPDATES
from deploy.study.tables.statistics import Comparison, SeedDifference, compare, holm
from distill.evaluation import direction

_CRITIC_METRICS: Mapping[int, Sequence[str]] = {
    1: ("critic/d_mm_off", "critic/d_mm_on", "critic/tightness_off", "critic/tightness_on"),
    2: (
        "critic/teacher_text.d_mm", "critic/student_text.d_mm",
        "critic/teacher_text.tightness", "critic/student_text.tightness",
    ),
}  # fmt: skip
"""By the results' hash format: the metrics were renamed together with it."""

BySeed = dict[str, dict[int, Any]]
"""recipe -> seed -> what was found."""


def report(results: Mapping[str, Any]) -> str:
    """The tables of a study."""
    seeds = sorted({run["seed"] for run in results["runs"]})
    intro = (
        f"Study `{results['study']}` on task `{results['task']}`, method {results['method_hash']}, seeds "
        f"{', '.join(map(str, seeds))}; differences are from `{results['baseline']}`, paired by seed and "
        "prompt, with 95 % intervals "
        + (
            "over seeds and prompts (docs/studies.md); * where Holm's adjusted p over the column is below 0.05."
            if len(seeds) > 1
            else "over prompts alone: one seed says nothing about another."
        )
    )
    if results["diverged"]:
        runs = ", ".join(f"`{run['recipe']}` seed {run['seed']}" for run in results["diverged"])
        intro += f"\n\nEnded with numbers that are not finite, and left out of every table: {runs}."
    tables = [_final_table(results), _drift_table(results), _equal_time_table(results)]
    if results["comparisons"]:
        tables.insert(1, _comparisons_table(results))
    if any(run["critics"] for run in results["runs"]):
        tables.append(_critics_table(results))
    if all(run["texts"] for run in results["runs"]):
        tables.append(_texts_table(results))
    return "\n\n".join([intro, *tables]) + "\n"


def _comparisons(
    results: Mapping[str, Any], pairs: Sequence[tuple[str, str]], metrics: Sequence[str]
) -> dict[tuple[str, str], dict[str, Comparison]]:
    """pair -> metric -> comparison, over the seeds that have the pair."""
    found: dict[tuple[str, str], dict[str, list[SeedDifference]]] = {}
    for row in results["differences"]:
        values = (math.nan if row[name] is None else row[name] for name in ("difference", "error"))
        by_metric = found.setdefault((row["recipe"], row["from"]), {})
        by_metric.setdefault(row["metric"], []).append(SeedDifference(*values))
    return {
        pair: {metric: compare(found[pair][metric]) for metric in metrics if metric in found[pair]}
        for pair in pairs
        if pair in found
    }


def _from_baseline(results: Mapping[str, Any], metrics: Sequence[str]) -> dict[tuple[str, str], Comparison]:
    """(recipe, metric) -> comparison with the baseline."""
    baseline = results["baseline"]
    recipes = dict.fromkeys(run["recipe"] for run in results["runs"])
    found = _comparisons(results, [(recipe, baseline) for recipe in recipes], metrics)
    return {(pair[0], metric): each for pair, of in found.items() for metric, each in of.items()}


def _comparisons_table(results: Mapping[str, Any]) -> str:
    """Pairs that the study asks for."""
    metrics = results["metrics"]
    found = _comparisons(results, [(ours, theirs) for ours, theirs in results["comparisons"]], metrics)
    names = {pair: f"`{pair[0]}` − `{pair[1]}`" for pair in found}
    shown = _shown({(names[pair], metric): each for pair, of in found.items() for metric, each in of.items()})
    rows = [[name, *(shown[name, metric].strip(" ()") for metric in metrics)] for name in names.values()]
    return "Further differences:\n\n" + _table(["", *map(_heading, metrics)], rows)


def _final_table(results: Mapping[str, Any]) -> str:
    metrics = results["metrics"]
    shown = _shown(_from_baseline(results, metrics))
    cost = _cost(results)
    rows = [
        [f"`{recipe}`", str(len(by_seed)), _chosen(results["chosen"][recipe])]
        + [
            f"{_mean(final.get(metric, math.nan) for final in by_seed.values()):.4f}"
            + shown.get((recipe, metric), "")
            for metric in metrics
        ]
        + [f"{cost[recipe]:.2f}"]
        for recipe, by_seed in _of_runs(results, lambda run: run["final"]).items()
    ]
    return _table(["recipe", "seeds", "chosen", *map(_heading, metrics), "s per update"], rows)


def _drift_table(results: Mapping[str, Any]) -> str:
    """TV in the first and last third of responses, on either text."""
    names = [f"{text}_text.tv_{part}" for text in ("teacher", "student") for part in ("early", "late")]
    by_seed = _of_runs(results, lambda run: run["final"])
    rows = []
    for recipe, found in by_seed.items():
        # Responses of fewer than three tokens have no thirds.
        values = [_mean(final.get(name, math.nan) for final in found.values()) for name in names]
        growth = [f"{late / early:.3f}" for early, late in (values[:2], values[2:])]
        rows.append([f"`{recipe}`", *(f"{value:.4f}" for value in values), *growth])
    heading = (
        "Early against late: TV in the first and last third of responses, and the last over the first. Above 1 on "
        "the student's text and not on the teacher's: it drifts."
    )
    columns = ["recipe", *map(_heading, names), "teacher text: late / early", "student text: late / early"]
    return heading + "\n\n" + _table(columns, rows)


def _equal_time_table(results: Mapping[str, Any]) -> str:
    """Every metric after as many seconds of training as the fastest recipe took in all."""
    metrics = results["metrics"]
    budget = min(run["evaluations"][-1]["train_s"] for run in results["runs"])
    by_recipe: dict[str, list[list[float]]] = {}
    for run in results["runs"]:
        by_recipe.setdefault(run["recipe"], []).append(_at_time(run["evaluations"], budget, metrics))
    rows = []
    for recipe, found in by_recipe.items():
        updates, *values = np.mean(found, axis=0)
        cells = [f"{updates:.0f}", *(f"{value:.4f}" for value in values)]
        rows.append([f"`{recipe}`", *("" if np.isnan(updates) else cell for cell in cells)])
    heading = (
        f"At equal time: after {budget:.0f} s of training (a proxy's counts; evaluations do not, nor the writing of the teacher's texts, once for all), interpolated in "
        "the logarithm of time between a run's evaluations, on the prompts that they share; empty where that is "
        "before the first. The slower recipes are read before their learning rate has come down, and runs shared "
        "the machine, so this is rough."
    )
    return heading + "\n\n" + _table(["recipe", "updates by then", *map(_heading, metrics)], rows)


def _at_time(evaluations: Sequence[Mapping[str, Any]], seconds: float, metrics: Sequence[str]) -> list[float]:
    """[update, *metrics] then; NaN before the first evaluation after training began. Distances fall fast
    at first, so a straight line from the start would lie far above them."""
    after = [point for point in evaluations if point["update"] > 0]
    if not after or seconds < after[0]["train_s"]:
        return [math.nan] * (1 + len(metrics))
    at = np.log([point["train_s"] for point in after])
    columns = [[point["update"] for point in after]]
    columns += [[point["values"][metric] for point in after] for metric in metrics]
    return [float(np.interp(math.log(seconds), at, column)) for column in columns]


def _critics_table(results: Mapping[str, Any]) -> str:
    """d_MM and tightness on batches that a critic has not been trained on."""
    names = _CRITIC_METRICS[results.get("hash_format", 1)]
    by_seed = _of_runs(results, lambda run: run["critics"])
    rows = [
        [f"`{recipe}`"]
        + [
            f"{_mean(found[name] for found in runs.values()):.3f}"
            if all(name in found for found in runs.values())
            else ""
            for name in names
        ]
        for recipe, runs in by_seed.items()
        if any(runs.values())
    ]
    heading = (
        f"Learned critics, means over the last {LAST_UPDATES} updates, each measured on positions before the "
        "critic's step on them: d_MM is the moment gap that the critic finds, tightness its share of what the "
        "regularised game's optimum finds there."
    )
    return heading + "\n\n" + _table(["recipe", *(_words(name.split("/")[1]) for name in names)], rows)


def _texts_table(results: Mapping[str, Any]) -> str:
    """What the students write, and how far their frontiers lie above the baseline's."""
    gains = [FRONTIER + score for score in FRONTIER_SCORES]
    shown = _shown(_from_baseline(results, [*TEXT_MEASURES, *gains]))
    rows = [
        [f"`{recipe}`"]
        + [
            f"{_mean(texts[name] for texts in by_seed.values()):.4f}" + shown.get((recipe, name), "")
            for name in TEXT_MEASURES
        ]
        + [shown.get((recipe, gain), "").strip(" ()") for gain in gains]
        + [_distinct(by_seed.values())]
        for recipe, by_seed in _of_runs(results, lambda run: run["texts"]).items()
    ]
    if results["teacher"]:
        ceiling = [
            f"{_mean(of_seed['texts'][name] for of_seed in results['teacher']):.4f}" for name in TEXT_MEASURES
        ]
        distinct = _distinct([of_seed["texts"] for of_seed in results["teacher"]])
        rows.append(["the teacher itself", *ceiling, *("" for _ in FRONTIER_SCORES), distinct])
    heading = (
        "What the students write: entropy and the teacher's log-probability of it (nats per token, temperature "
        "1), accuracy of a classifier that tells it from the teacher's (0.5 is best), bits per byte of the "
        "references, TV of the student read at temperature 0.9; then how far the score lies above the "
        "baseline's at equal entropy (temperatures 0.5 to 1); shares of distinct 1-, 2- and 3-grams. The teacher's row: other texts of its own in a student's place."
    )
    names = [*(name.replace("_", " ") for name in TEXT_MEASURES),
             *gains, "distinct 1, 2, 3"]  # fmt: skip
    return heading + "\n\n" + _table(["recipe", *names], rows)


def _distinct(texts: Collection[Mapping[str, float]]) -> str:
    return ", ".join(f"{_mean(each[f't1.distinct_{n}'] for each in texts):.3f}" for n in (1, 2, 3))


def _of_runs(results: Mapping[str, Any], load: Callable[[Mapping[str, Any]], Any]) -> BySeed:
    found: BySeed = {}
    for run in results["runs"]:
        found.setdefault(run["recipe"], {})[run["seed"]] = load(run)
    return found


def _shown(comparisons: Mapping[tuple[str, str], Comparison]) -> dict[tuple[str, str], str]:
    """By (recipe, metric); Holm's correction over the recipes of a metric."""
    columns: dict[str, list[tuple[str, str]]] = {}
    for key in comparisons:
        columns.setdefault(key[1], []).append(key)
    adjusted: dict[tuple[str, str], float] = {}
    for keys in columns.values():
        adjusted |= zip(keys, holm([comparisons[key].p_value for key in keys]), strict=True)
    return {
        key: f" ({found.difference:+.4f}{'*' if adjusted[key] < 0.05 else ''} [{found.low:+.4f}, {found.high:+.4f}])"
        for key, found in comparisons.items()
    }


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _chosen(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name.split('.')[-1]} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in settings.items()
    )


def _heading(metric: str) -> str:
    arrow = {1: " ↑", -1: " ↓"}.get(direction(metric), "")
    return _words(metric) + arrow


def _words(metric: str) -> str:
    return metric.replace("_text.", " text: ").replace("_", " ")


def _cost(results: Mapping[str, Any]) -> dict[str, float]:
    """Median over the runs of seconds per update."""
    seconds: dict[str, list[float]] = {}
    for run in results["runs"]:
        first, last = run["evaluations"][0], run["evaluations"][-1]  # before the first: a proxy's training
        seconds.setdefault(run["recipe"], []).append(
            (last["train_s"] - first["train_s"]) / max(last["update"], 1)
        )
    return {recipe: float(np.median(values)) for recipe, values in seconds.items()}
