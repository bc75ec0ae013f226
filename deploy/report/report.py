"""What a run has reached, on the terminal: the before/after table, three answers, where things are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.report.text import before_after_table, strip_control, three_answers
from distill.errors import ConfigError
from distill.evaluation import Evaluation, load_evaluation, paired_difference
from distill.run.folder import RunFolder


def print_report(run_dir: str | Path, summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the report of a finished run."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    folder = RunFolder(run_dir)
    before, after = (_evaluation(folder.evaluation(label)) for label in ("before", "after"))
    console.print()
    console.print(before_after_table(summary["before"], summary["after"], paired_difference(before, after)))
    answers = _answers(folder)
    if answers:
        console.print(three_answers(*answers), markup=False)
    console.print()
    peak = summary["peak_pss_bytes"].get("total", 0) / 2**30
    console.print(
        f"{summary['updates']} updates of recipe {summary['recipe']} in {summary['wall_s'] / 60:.1f} minutes, "
        f"peak memory {peak:.1f} GiB (PSS of all processes)",
        markup=False,
    )
    if (best := summary.get("best")) is not None:
        console.print(
            f"best during training by {best['metric']}: update {best['update']} ({best['value']:.4f}), in {folder.best}",
            markup=False,
        )
    console.print(f"talk to the student: distill chat {_shown(folder.student)}", markup=False)


def _evaluation(path: Path) -> Evaluation:
    try:
        return load_evaluation(path)
    except (OSError, ValueError) as error:
        remedy = "it is written by the run alone; run it again in another run_dir"
        raise ConfigError("evaluation", path, f"be readable ({error})", remedy) from None


def _answers(folder: RunFolder) -> tuple[list[str], list[str], list[str], list[str]] | None:
    """Prompts, and the answers of teacher, student before and student after."""
    texts = []
    for label in ("before", "after"):
        path = folder.evaluations / f"{label}-answers.json"
        if not path.exists():
            return None
        texts.append(json.loads(path.read_text()))
    before, after = texts
    return (
        [strip_control(row["prompt"]) for row in after],
        [row["teacher"] for row in after],
        [row["student"] for row in before],
        [row["student"] for row in after],
    )


def _shown(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
