"""Plots of a study: metrics over the course of the runs, and scores against entropy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.study.measure.measures_file import FRONTIER_SCORES, TEMPERATURES
from deploy.study.tables.study_report import runs_by_recipe
from distill.files import write_bytes


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``curves.svg``, and ``frontier.svg`` where texts were measured; both show means over seeds."""
    drawn = [_curves(results, folder / "curves.svg")]
    if all(run["texts"] for run in results["runs"]):
        drawn.append(_frontier(results, folder / "frontier.svg"))
    return drawn


def _curves(results: Mapping[str, Any], path: Path) -> Path:
    """Draw a row per metric: against updates on the left, against seconds of training on the right."""
    metrics: Sequence[str] = results["metrics"]
    figure, axes = _figure(len(metrics), 2)
    for row, metric in enumerate(metrics):
        for recipe, runs in runs_by_recipe(results).items():
            values = np.mean(
                [[point["values"][metric] for point in run["evaluations"]] for run in runs], axis=0
            )
            for column, key in enumerate(("update", "train_s")):
                at = np.mean([[point[key] for point in run["evaluations"]] for run in runs], axis=0)
                axes[row, column].plot(at, values, marker=".", label=recipe)
        axes[row, 0].set_ylabel(metric)
    axes[-1, 0].set_xlabel("updates")
    axes[-1, 1].set_xlabel("seconds of training")
    return _save(figure, axes[0, 1], path)


def _frontier(results: Mapping[str, Any], path: Path) -> Path:
    """Draw scores against entropy at several temperatures; the teacher's curve is black."""
    figure, axes = _figure(1, len(FRONTIER_SCORES))
    lines: dict[str, tuple[Sequence[Mapping[str, Any]], dict[str, Any]]] = {
        recipe: (runs, {}) for recipe, runs in runs_by_recipe(results).items()
    }
    if results["teacher"]:
        lines["the teacher itself"] = (results["teacher"], {"color": "black", "linestyle": "--"})
    for label, (runs, style) in lines.items():
        for column, score in enumerate(FRONTIER_SCORES):
            curve = [
                [np.mean([run["texts"][f"t{at:g}.{name}"] for run in runs]) for name in ("entropy", score)]
                for at in TEMPERATURES
            ]
            axes[0, column].plot(*np.transpose(curve), marker=".", label=label, **style)
            axes[0, column].set_xlabel("entropy, nats per token")
            axes[0, column].set_ylabel(score)
    return _save(figure, axes[0, -1], path)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, legend_next_to: Any, path: Path) -> Path:
    import matplotlib

    legend_next_to.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    # No date and no random ids, so that the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"}):
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_bytes(path, drawn.getvalue())
    return path
