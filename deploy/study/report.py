"""A study's results as Markdown: final values, equal time, what the students write.

Every number in a table comes from runs of one method hash (the study's folder names it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deploy.study.measures import FRONTIER_SCORES, Measures, frontier_gain, measures_path
from deploy.study.results import LAST_UPDATES
from deploy.study.statistics import Comparison, PairedPrompts, compare, holm
from distill.evaluation import Evaluation, direction, load_evaluation
from distill.run_folder import RunFolder

Found = TypeVar("Found")
BySeed = dict[str, dict[int, Found]]
"""recipe -> seed -> what was found."""

TEXT_MEASURES = ("t1.entropy", "t1.teacher_logprob", "two_sample", "bits_per_byte", "read_at0.9.tv")


def report(results: Mapping[str, Any], folder: Path) -> str:
    """The tables of a study; ``folder`` holds its runs."""
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
    tables = [_final_table(results, folder), _drift_table(results), _equal_time_table(results)]
    if results["comparisons"]:
        tables.insert(1, _comparisons_table(results, folder))
    if any(run["critics"] for run in results["runs"]):
        tables.append(_critics_table(results))
    if all(run["texts"] for run in results["runs"]):
        tables.append(_texts_table(results, folder))
    return "\n\n".join([intro, *tables]) + "\n"


def _finals(results: Mapping[str, Any], folder: Path) -> BySeed[Evaluation]:
    return _of_runs(
        results, lambda run: load_evaluation(RunFolder(folder / "runs" / run["run"]).evaluation("after"))
    )


def _comparisons_table(results: Mapping[str, Any], folder: Path) -> str:
    """Pairs that the study asks for."""
    finals = _finals(results, folder)
    comparisons: dict[tuple[str, str], Comparison] = {}
    for ours, theirs in results["comparisons"]:
        shared = sorted(finals.get(ours, {}).keys() & finals.get(theirs, {}).keys())
        for metric in results["metrics"] if shared else ():
            pairs = [_paired(finals[ours][seed], finals[theirs][seed], metric) for seed in shared]
            comparisons[f"`{ours}` − `{theirs}`", metric] = compare(pairs)
    shown = _shown(comparisons)
    rows = [
        [pair, *(shown[pair, metric].strip(" ()") for metric in results["metrics"])]
        for pair in dict.fromkeys(pair for pair, _ in comparisons)
    ]
    return "Further differences:\n\n" + _table(["", *map(_heading, results["metrics"])], rows)


def _final_table(results: Mapping[str, Any], folder: Path) -> str:
    metrics = results["metrics"]
    finals = _finals(results, folder)
    comparisons = {
        (recipe, metric): compare([_paired(ours, theirs, metric) for ours, theirs in pairs])
        for recipe, pairs in _pairs(finals, results["baseline"]).items()
        for metric in metrics
    }
    shown = _shown(comparisons)
    cost = _cost(results)
    rows = [
        [f"`{recipe}`", str(len(by_seed)), _chosen(results["chosen"][recipe])]
        + [
            f"{_mean(evaluation.value(metric) for evaluation in by_seed.values()):.4f}"
            + shown.get((recipe, metric), "")
            for metric in metrics
        ]
        + [f"{cost[recipe]:.2f}"]
        for recipe, by_seed in finals.items()
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
        f"At equal time: after {budget:.0f} s of training (a proxy's counts, evaluations do not), interpolated in "
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
    names = ("critic/d_mm_off", "critic/d_mm_on", "critic/tightness_off", "critic/tightness_on")
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
    return (
        heading + "\n\n" + _table(["recipe", *(name.split("/")[1].replace("_", " ") for name in names)], rows)
    )


def _texts_table(results: Mapping[str, Any], folder: Path) -> str:
    """What the students write, and how far their frontiers lie above the baseline's."""
    found = _of_runs(results, lambda run: Measures.load(measures_path(folder / "runs" / run["run"])))
    pairs = _pairs(found, results["baseline"])
    plain = {
        (recipe, name): compare(
            [PairedPrompts.of(ours.per_prompt(name), theirs.per_prompt(name)) for ours, theirs in both]
        )
        for recipe, both in pairs.items()
        for name in TEXT_MEASURES
    }
    gains = {
        (recipe, score): frontier_gain(both, score)
        for recipe, both in pairs.items()
        for score in FRONTIER_SCORES
    }
    shown = _shown(plain | gains)
    rows = [
        [f"`{recipe}`"]
        + [
            f"{_mean(measures.value(name) for measures in by_seed.values()):.4f}"
            + shown.get((recipe, name), "")
            for name in TEXT_MEASURES
        ]
        + [shown.get((recipe, score), "").strip(" ()") for score in FRONTIER_SCORES]
        + [f"{_mean(measures.value('t1.distinct_2') for measures in by_seed.values()):.3f}"]
        for recipe, by_seed in found.items()
    ]
    if results["teacher"]:
        ceiling = [
            f"{_mean(of_seed['texts'][name] for of_seed in results['teacher']):.4f}" for name in TEXT_MEASURES
        ]
        distinct = f"{_mean(of_seed['texts']['t1.distinct_2'] for of_seed in results['teacher']):.3f}"
        rows.append(["the teacher itself", *ceiling, *("" for _ in FRONTIER_SCORES), distinct])
    heading = (
        "What the students write: entropy and the teacher's log-probability of it (nats per token, temperature "
        "1), accuracy of a classifier that tells it from the teacher's (0.5 is best), bits per byte of the "
        "references, TV of the student read at temperature 0.9; then how far the score lies above the "
        "baseline's at equal entropy (temperatures 0.5 to 1); distinct bigrams. The teacher's row: other texts of its own in a student's place."
    )
    names = [*(name.replace("_", " ") for name in TEXT_MEASURES),
             *(f"frontier {score}" for score in FRONTIER_SCORES), "distinct 2"]  # fmt: skip
    return heading + "\n\n" + _table(["recipe", *names], rows)


def _of_runs(results: Mapping[str, Any], load: Any) -> BySeed[Any]:
    found: BySeed[Any] = {}
    for run in results["runs"]:
        found.setdefault(run["recipe"], {})[run["seed"]] = load(run)
    return found


def _pairs(found: BySeed[Any], baseline: str) -> dict[str, list[tuple[Any, Any]]]:
    """recipe -> (its, the baseline's) of every seed that it has."""
    return {
        recipe: [(ours, found[baseline][seed]) for seed, ours in by_seed.items()]
        for recipe, by_seed in found.items()
        if recipe != baseline
    }


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
    return metric.replace("_text.", " text: ").replace("_", " ") + arrow


def _paired(recipe: Evaluation, baseline: Evaluation, metric: str) -> PairedPrompts:
    """Both evaluations on the prompts that they share.

    Raises: ValueError when they were not made on the same prompts.
    """
    if not np.array_equal(recipe.prompt_indices, baseline.prompt_indices):
        raise ValueError("two recipes of a seed must be evaluated on the same prompts")
    return PairedPrompts.of(recipe.per_prompt(metric), baseline.per_prompt(metric))


def _cost(results: Mapping[str, Any]) -> dict[str, float]:
    """Median over the runs of seconds per update."""
    seconds: dict[str, list[float]] = {}
    for run in results["runs"]:
        first, last = run["evaluations"][0], run["evaluations"][-1]  # before the first: a proxy's training
        seconds.setdefault(run["recipe"], []).append(
            (last["train_s"] - first["train_s"]) / max(last["update"], 1)
        )
    return {recipe: float(np.median(values)) for recipe, values in seconds.items()}
