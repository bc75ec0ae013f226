"""A study's results as Markdown: final values, paired differences from the baseline, cost.

Every number in a table comes from runs of one method hash (the study's folder names it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.study.statistics import Comparison, PairedPrompts, compare, holm
from distill.evaluation import Evaluation, direction, load_evaluation
from distill.run_folder import RunFolder


def report(results: Mapping[str, Any], folder: Path) -> str:
    """The tables of a study; ``folder`` holds its runs."""
    finals = _finals(results, folder)
    metrics, baseline = results["metrics"], results["baseline"]
    comparisons = _comparisons(finals, metrics, baseline)
    lines = [
        f"Study `{results['study']}` on task `{results['task']}`, method {results['method_hash']}, "
        f"{len(next(iter(finals.values())))} seeds; differences are from `{baseline}`, paired by seed and "
        "prompt, with 95 % bootstrap intervals; * where Holm's adjusted p over the table is below 0.05.",
        "",
        "| recipe | chosen | " + " | ".join(_heading(metric) for metric in metrics) + " | s per update |",
        "|---|---|" + "---|" * (len(metrics) + 1),
    ]
    cost = _cost(results)
    for recipe, evaluations in finals.items():
        cells = []
        for metric in metrics:
            value = float(np.mean([evaluation.value(metric) for evaluation in evaluations.values()]))
            cells.append(f"{value:.4f}" + _shown(comparisons.get((recipe, metric))))
        chosen = ", ".join(
            f"{name.split('.')[-1]} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
            for name, value in results["chosen"][recipe].items()
        )
        lines.append(f"| `{recipe}` | {chosen} | " + " | ".join(cells) + f" | {cost[recipe]:.2f} |")
    return "\n".join(lines) + "\n"


def _heading(metric: str) -> str:
    arrow = {1: " ↑", -1: " ↓"}.get(direction(metric), "")
    return metric.replace("_text.", " text: ").replace("_", " ") + arrow


def _shown(found: tuple[Comparison, float] | None) -> str:
    if found is None:
        return ""
    comparison, adjusted = found
    star = "*" if adjusted < 0.05 else ""
    return f" ({comparison.difference:+.4f}{star} [{comparison.low:+.4f}, {comparison.high:+.4f}])"


def _finals(results: Mapping[str, Any], folder: Path) -> dict[str, dict[int, Evaluation]]:
    """recipe -> seed -> the evaluation after its last update."""
    finals: dict[str, dict[int, Evaluation]] = {}
    for run in results["runs"]:
        path = RunFolder(folder / "runs" / run["run"]).evaluation("after")
        finals.setdefault(run["recipe"], {})[run["seed"]] = load_evaluation(path)
    return finals


def _comparisons(
    finals: Mapping[str, Mapping[int, Evaluation]], metrics: Sequence[str], baseline: str
) -> dict[tuple[str, str], tuple[Comparison, float]]:
    """(recipe, metric) -> comparison with the baseline, and its p adjusted over the whole table."""
    found = {
        (recipe, metric): compare(
            [paired(finals[recipe][seed], finals[baseline][seed], metric) for seed in finals[recipe]]
        )
        for recipe in finals
        if recipe != baseline
        for metric in metrics
    }
    adjusted = holm([comparison.p_value for comparison in found.values()])
    return {key: (value, p) for (key, value), p in zip(found.items(), adjusted, strict=True)}


def paired(recipe: Evaluation, baseline: Evaluation, metric: str) -> PairedPrompts:
    """Both evaluations on the prompts that they share.

    Raises: ValueError when they were not made on the same prompts.
    """
    if not np.array_equal(recipe.prompt_indices, baseline.prompt_indices):
        raise ValueError("two recipes of a seed must be evaluated on the same prompts")
    both = [evaluation.per_prompt(metric) for evaluation in (recipe, baseline)]
    return PairedPrompts(*(np.stack([part[i] for part in both]) for i in (0, 1)))


def _cost(results: Mapping[str, Any]) -> dict[str, float]:
    """Median over the runs of seconds per update."""
    seconds: dict[str, list[float]] = {}
    for run in results["runs"]:
        last = run["evaluations"][-1]
        seconds.setdefault(run["recipe"], []).append(last["train_s"] / max(last["update"], 1))
    return {recipe: float(np.median(values)) for recipe, values in seconds.items()}
