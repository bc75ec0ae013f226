"""The results of one finished run, read from its folder: evaluations, critic metrics, text measures."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from deploy.study.measure.measures_file import Measures, are_measured, measures_path
from distill.evaluation import EXTRA_METRICS, METRICS, Evaluation, load_evaluation
from distill.run.folder import RunFolder
from distill.run.metrics import read_metrics

LAST_UPDATES = 100
"""The number of updates over which the critics' metrics are averaged."""


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation in the course of a run, to compare runs at equal updates or at equal time."""

    update: int
    train_s: float
    """Seconds of training until then, including a proxy's training and excluding evaluations."""
    values: dict[str, float]
    """Metric -> value, on the prompts that all evaluations of the run share."""


def final_value(run_dir: Path, metric: str) -> float:
    """One metric of the evaluation after the last update."""
    return load_evaluation(RunFolder(run_dir).evaluation("after")).value(metric)


def final_values(run_dir: Path) -> dict[str, float]:
    """All metrics that the evaluation after the last update has measured."""
    evaluation = load_evaluation(RunFolder(run_dir).evaluation("after"))
    values = {name: evaluation.value(name) for name in (*METRICS, *EXTRA_METRICS)}
    return {name: round(value, 6) for name, value in values.items() if math.isfinite(value)}


def curve(run_dir: Path, metrics: tuple[str, ...]) -> list[CurvePoint]:
    """The evaluations of a run, in the order of their updates."""
    folder = RunFolder(run_dir)
    seconds = [(folder.read_summary() or {}).get("proxy_training_s") or 0.0]
    for value in read_metrics(folder.path)["timing/update_s"].to_pylist():
        seconds.append(seconds[-1] + value)
    last = len(seconds) - 1
    found = {path.stem: load_evaluation(path) for path in folder.evaluations.glob("*.parquet")}
    shared = functools.reduce(np.intersect1d, [evaluation.prompt_indices for evaluation in found.values()])
    points = []
    for label, evaluation in found.items():
        update = {"before": 0, "after": last}.get(label)
        if update is None:
            update = int(label.removeprefix("step-"))
        values = {metric: round(_on(evaluation, shared).value(metric), 6) for metric in metrics}
        points.append(CurvePoint(update, round(seconds[update], 2), values))
    return sorted(points, key=lambda point: point.update)


def _on(evaluation: Evaluation, prompts: np.ndarray) -> Evaluation:
    """The part of an evaluation that is on the given prompts."""
    keep = pa.array(np.isin(evaluation.prompt_indices, prompts))
    return Evaluation(evaluation.label, evaluation.table.filter(keep))


def critic_means(run_dir: Path) -> dict[str, float]:
    """Means of the critics' metrics over the last updates; empty without learned critics."""
    table = read_metrics(RunFolder(run_dir).path)
    names = [name for name in table.column_names if name.startswith("critic/")]
    values = {name: table[name].to_numpy()[-LAST_UPDATES:] for name in names}
    return {name: round(float(np.nanmean(found)), 6) for name, found in values.items() if len(found)}


def text_measures(run_dir: Path) -> dict[str, float] | None:
    """The measures of the student's texts, or None if they were not taken."""
    if not are_measured(measures_path(run_dir)):
        return None
    return Measures.load(measures_path(run_dir)).values()
