"""The report of a finished run: the before/after table, sample answers, and where the results are."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploy.program import program
from deploy.report.model import Code, Column, Line, Number, Paragraph, Report, Sample, Table, Tone, Toned
from distill.errors import ConfigError
from distill.evaluation import METRICS, Evaluation, direction, load_evaluation, paired_difference
from distill.run.folder import RunFolder

LABELS = {
    "teacher_text.tv": "TV, teacher's text",
    "teacher_text.forward_kl": "forward KL, teacher's text",
    "teacher_text.reverse_kl": "reverse KL, teacher's text",
    "teacher_text.jsd": "JSD, teacher's text",
    "student_text.tv": "TV, student's text",
    "student_text.forward_kl": "forward KL, student's text",
    "student_text.reverse_kl": "reverse KL, student's text",
    "student_text.jsd": "JSD, student's text",
    "rouge_l.teacher": "ROUGE-L with the teacher",
    "rouge_l.reference": "ROUGE-L with the reference",
    "entropy": "student's entropy",
    "length": "response tokens",
}

SIGNIFICANT = 2.0
"""Standard errors that a difference must exceed to be called better or worse."""


def run_report(run_dir: str | Path, summary: Mapping[str, Any]) -> Report:
    """The report of a run. ``summary``: the contents of its ``summary.json``.

    Raises: ConfigError when an evaluation of the run cannot be read.
    """
    folder = RunFolder(run_dir)
    paired = paired_difference(*(_evaluation(folder.evaluation(label)) for label in ("before", "after")))
    return Report(
        title=f"Run {_shortest(folder.path)}",
        blocks=(
            Paragraph((what_happened(summary["before"], summary["after"], paired),)),
            before_after_table(summary["before"], summary["after"], paired),
            *_samples(folder),
            *(Paragraph(line) for line in _closing_lines(folder, summary)),
        ),
    )


def what_happened(before: Mapping[str, Any], after: Mapping[str, Any], paired: Mapping[str, Any]) -> str:
    """The outcome in one sentence. The arguments are those of :func:`before_after_table`."""

    def moved(metric: str, better: str, worse: str, same: str) -> str:
        start, (difference, stderr) = _value(before, metric), paired.get(metric) or (None, None)
        if not start or difference is None or stderr is None or math.isnan(difference + stderr):
            return "not measured"
        if abs(difference) <= SIGNIFICANT * stderr:
            return same
        return (
            f"{100 * abs(difference) / start:.0f} % {better if direction(metric) * difference > 0 else worse}"
        )

    words = ("nearer to its teacher", "farther from its teacher", "as far from its teacher as before")
    return (
        f"On {after['num_prompts']} held-out prompts, the student is now {moved('teacher_text.tv', *words)} "
        f"on the teacher's text and {moved('student_text.tv', *words)} on its own text (total variation); "
        "the likeness of its answers to the teacher's (ROUGE-L) is "
        f"{moved('rouge_l.teacher', 'higher', 'lower', 'unchanged')}."
    )


def before_after_table(
    before: Mapping[str, Any], after: Mapping[str, Any], paired: Mapping[str, Any]
) -> Table:
    """A row per metric: before, after, and the difference paired by prompt.

    ``before`` and ``after``: ``Evaluation.to_dict()``; ``paired``: metric -> (difference,
    standard error), from ``paired_difference``; a metric can be missing from it.
    """
    rows: list[tuple[Line, ...]] = []
    for metric in METRICS:
        difference, stderr = paired.get(metric) or (None, None)
        rows.append(
            (
                (LABELS[metric],),
                _estimate(metric, _value(before, metric), before["stderr"].get(metric)),
                _estimate(metric, _value(after, metric), after["stderr"].get(metric)),
                _estimate(metric, difference, stderr, signed=True),
                _verdict(metric, difference, stderr),
            )
        )
    numbers = [Column(name, numeric=True) for name in ("before", "after", "difference")]
    return Table(
        title=f"Before and after, {after['num_prompts']} held-out prompts",
        columns=(Column("metric"), *numbers, Column("")),
        rows=tuple(rows),
        note="TV: total variation; KL and entropy in nats per token; ROUGE-L: F1, 0 to 1. "
        "±: one standard error over prompts; that of the difference is paired by prompt. "
        f"Better or worse: by more than {SIGNIFICANT:g} standard errors.",
    )


def _evaluation(path: Path) -> Evaluation:
    try:
        return load_evaluation(path)
    except (OSError, ValueError) as error:
        remedy = "only the run itself writes it; repeat the run in another run_dir"
        raise ConfigError("evaluation", path, f"be readable ({error})", remedy) from None


def _samples(folder: RunFolder) -> list[Sample]:
    """Prompts with the answers of the teacher, and of the student before and after training."""
    paths = [folder.evaluations / f"{label}-answers.json" for label in ("before", "after")]
    if not all(path.exists() for path in paths):
        return []
    both = zip(*(json.loads(path.read_text()) for path in paths), strict=True)
    return [
        Sample(
            title=f"prompt {number}, answered greedily",
            prompt=after["prompt"],
            answers=(
                ("teacher", after["teacher"]),
                ("student before", before["student"]),
                ("student after", after["student"]),
            ),
        )
        for number, (before, after) in enumerate(both, start=1)
    ]


def _closing_lines(folder: RunFolder, summary: Mapping[str, Any]) -> Iterator[Line]:
    peak = summary["peak_pss_bytes"].get("total", 0) / 2**30
    yield (
        f"{summary['updates']} updates of recipe ",
        Code(summary["recipe"]),
        f" in {summary['wall_s'] / 60:.1f} minutes, peak memory {peak:.1f} GiB (PSS of all processes)",
    )
    if (best := summary.get("best")) is not None:
        yield (
            f"best during training by {best['metric']}: update {best['update']} ({best['value']:.4f}), in ",
            Code(_shortest(folder.best)),
        )
    yield "talk to the student: ", Code(shlex.join([program(), "chat", _shortest(folder.student)]))


def _shortest(path: Path) -> str:
    """Relative to the working directory if the path is inside it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _value(evaluation: Mapping[str, Any], metric: str) -> float | None:
    value: Any = evaluation
    for part in metric.split("."):
        value = value[part]
    return value


def _estimate(metric: str, value: float | None, stderr: float | None, *, signed: bool = False) -> Line:
    if value is None or math.isnan(value):
        return (Toned("not measured", Tone.FAINT),)
    return (Number(value, digits=2 if metric == "length" else 4, signed=signed, stderr=stderr),)


def _verdict(metric: str, difference: float | None, stderr: float | None) -> Line:
    if difference is None or stderr is None or math.isnan(difference) or math.isnan(stderr):
        return ()
    arrow = "↑" if difference > 0 else "↓"
    if abs(difference) <= SIGNIFICANT * stderr:
        return (Toned("= within the noise", Tone.FAINT),)
    gain = direction(metric) * difference
    if gain == 0:
        return (f"{arrow} changed",)
    return (Toned(f"{arrow} better", Tone.GOOD) if gain > 0 else Toned(f"{arrow} worse", Tone.BAD),)
