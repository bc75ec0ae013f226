"""The report of a run for a terminal: the before/after table, sample answers, and where the results are.

The page of the same run (``run_page.py``) takes its sentence, its table and its samples from here.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from deploy.program import program
from deploy.report.model import Code, Column, Line, Number, Paragraph, Report, Sample, Table, Tone, Toned
from deploy.report.run_files import RunFiles, number_in, numbers_in
from distill.evaluation import METRICS, direction

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


def run_report(run: RunFiles) -> Report:
    """The report of a run for a terminal: as much of it as the run's folder shows."""
    table = comparison_table(run)
    return Report(
        title=f"Run {shortest(run.folder.path)}",
        blocks=(
            Paragraph(outcome(run)),
            *((table,) if table is not None else ()),
            *samples(run),
            *(Paragraph(line) for line in _closing_lines(run)),
        ),
    )


def outcome(run: RunFiles) -> Line:
    """What came out of a run, or how far it has come, in one sentence."""
    planned = f" of {run.planned_updates}" if run.planned_updates is not None else ""
    if run.before is None or run.newest is None or not run.paired:
        state = (
            "is still being written" if run.is_running else "has ended" if run.has_ended else "has not ended"
        )
        return (
            f"The run {state} after {run.updates}{planned} updates, and its folder has no comparison of the student "
            "before and after training.",
        )
    sentence = what_happened(run.before.to_dict(), run.newest.to_dict(), run.paired)
    if run.after is None:
        return (f"After update {run.during[-1].update}{planned}: {sentence}",)
    return (sentence,)


def comparison_table(run: RunFiles) -> Table | None:
    """The table of :func:`before_after_table`; None where only one side has been measured, or neither."""
    if run.before is None or run.newest is None:
        return None
    table = before_after_table(run.before.to_dict(), run.newest.to_dict(), run.paired)
    if run.after is not None:
        return table
    update = run.during[-1].update
    first, before, after, *rest = table.columns
    return replace(
        table,
        title=f"Before training and after update {update}, {run.newest.num_prompts} held-out prompts",
        columns=(first, before, replace(after, heading=f"update {update}"), *rest),
        note=f"{table.note} The difference is that on the prompts which both evaluations have.",
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
                estimated(metric, _value(before, metric), before["stderr"].get(metric)),
                estimated(metric, _value(after, metric), after["stderr"].get(metric)),
                estimated(metric, difference, stderr, signed=True),
                verdict(metric, difference, stderr),
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


def samples(run: RunFiles) -> list[Sample]:
    """Prompts with the answers of the teacher, and of the student before and after training, as far as there are any."""
    before, after = run.answers.get("before", []), run.answers.get("after", [])
    found: list[Sample] = []
    for number, rows in enumerate(zip_longest(before, after), start=1):
        row = rows[0] or rows[1]
        answers = [("teacher", row["teacher"])]
        answers += [
            (f"student {when}", each["student"])
            for when, each in zip(("before", "after"), rows, strict=True)
            if each
        ]
        title = f"prompt {number}, answered greedily"
        found.append(Sample(title=title, prompt=row["prompt"], answers=tuple(answers)))
    return found


def _closing_lines(run: RunFiles) -> Iterator[Line]:
    if run.summary is not None:
        peak = numbers_in(run.summary, "peak_pss_bytes").get("total", 0) / 2**30
        yield (
            f"{run.updates} updates of recipe ",
            Code(str(run.summary["recipe"])),
            f" in {(number_in(run.summary, 'wall_s') or 0) / 60:.1f} minutes, "
            f"peak memory {peak:.1f} GiB (PSS of all processes)",
        )
    if (line := best_line(run)) is not None:
        yield line
    if run.folder.student.is_dir():
        yield talk_line(run)


def best_line(run: RunFiles) -> Line | None:
    """Name the best student during training, if the run has kept one."""
    best = run.best or {}
    value, update = number_in(best, "value"), number_in(best, "update")
    if value is None or update is None:
        return None
    return (
        f"best during training by {best.get('metric')}: update {update:.0f} ({value:.4f}), in ",
        Code(shortest(run.folder.best)),
    )


def talk_line(run: RunFiles) -> Line:
    return "talk to the student: ", Code(shlex.join([program(), "chat", shortest(run.folder.student)]))


def shortest(path: Path) -> str:
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


def estimated(metric: str, value: float | None, stderr: float | None, *, signed: bool = False) -> Line:
    """Return a value with its standard error as a cell."""
    if value is None or math.isnan(value):
        return (Toned("not measured", Tone.FAINT),)
    return (Number(value, digits=2 if metric == "length" else 4, signed=signed, stderr=stderr),)


def verdict(metric: str, difference: float | None, stderr: float | None) -> Line:
    """Say whether a metric has become better or worse, by more than :data:`SIGNIFICANT` standard errors."""
    if difference is None or stderr is None or math.isnan(difference) or math.isnan(stderr):
        return ()
    arrow = "↑" if difference > 0 else "↓"
    if abs(difference) <= SIGNIFICANT * stderr:
        return (Toned("= within the noise", Tone.FAINT),)
    gain = direction(metric) * difference
    if gain == 0:
        return (f"{arrow} changed",)
    return (Toned(f"{arrow} better", Tone.GOOD) if gain > 0 else Toned(f"{arrow} worse", Tone.BAD),)
