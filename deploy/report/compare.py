"""Runs side by side, from their folders alone: what differs in their settings, and what came of it.

:func:`comparison` builds the page, and :func:`comparison_report` takes what a terminal can show from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from deploy.report.comparable import Compared, listed, mismatches, settings_table, versions_table
from deploy.report.compare_cost import cost_table, stage_lines
from deploy.report.curves import busy_chart, evaluation_charts, seconds_chart, update_charts
from deploy.report.model import (
    Block,
    Column,
    Interval,
    Items,
    Line,
    Page,
    PageBlock,
    Paragraph,
    Report,
    Sample,
    Section,
    Table,
    Tone,
    Toned,
)
from deploy.report.overlay import overlaid
from deploy.report.run_files import READ_ERRORS, RunFiles, number_in, read_run
from deploy.report.run_page import MOST_SAMPLES, write_html
from deploy.report.run_report import LABELS, SIGNIFICANT, estimated, outcome, shortest, verdict
from distill.errors import ConfigError
from distill.evaluation import METRICS, Estimate, Evaluation, paired_difference

PAGE = "comparison.html"
"""The page in the folder of the first run, unless another place is named."""
MOST_RUNS = 6
"""More columns do not fit beside each other, and more lines in one chart cannot be distinguished."""
MOST_ALARMS = 40
_NOT_SHOWN, _FAINT = "What is not shown", Tone.FAINT


def read_runs(run_dirs: Sequence[str | Path]) -> list[Compared]:
    """Read the folders of runs that are to be compared; the first is the one that others are compared with.

    Raises: ConfigError when a folder is not a run's, when one is named twice, and when there are too many.
    """
    if len(run_dirs) > MOST_RUNS:
        must = f"name at most {MOST_RUNS - 1} runs"
        raise ConfigError(
            "--compare", f"{len(run_dirs) - 1} runs", must, "compare recipes with `distill study`"
        )
    seen: set[Path] = set()
    for run_dir in run_dirs:
        folder = Path(run_dir).resolve()
        if folder in seen:
            raise ConfigError("--compare", run_dir, "name each run once", "leave it out")
        seen.add(folder)
    return [Compared(letter, read_run(run_dir)) for letter, run_dir in zip("ABCDEF", run_dirs, strict=False)]


def write_comparison(runs: Sequence[Compared], page: Page, path: Path | None = None) -> Path:
    """Write the page into the folder of the first run unless another place is named; returns where it is.

    Raises: ConfigError when the file cannot be written there.
    """
    return write_html(page, runs[0].run.folder.path / PAGE if path is None else path)


def comparison(runs: Sequence[Compared]) -> Page:
    """The page of a comparison, as far as the folders allow."""
    reasons = mismatches(runs)
    sections = [
        Section("Not comparable", (Items(tuple((Toned(reason, Tone.BAD),) for reason in reasons)),))
        if reasons
        else None,
        _problems(runs),
        Section("Runs", (_overview(runs), Items(tuple(_outcomes(runs))))),
        Section("Settings", tuple(_settings(runs))),
        Section("Before and after", tuple(_measures(runs, comparable=not reasons))),
        Section("Answers", tuple(_answers(runs))),
        Section("Learning curves", tuple(_curves(runs))),
        Section("Stages", tuple(_stages(runs))),
        Section("Cost", (cost_table(runs),)),
        Section("Alarms", tuple(_alarms(runs))),
    ]
    return Page(
        title=f"Comparison of {listed([each.label for each in runs])}",
        lead=_lead(runs, reasons),
        sections=tuple(section for section in sections if section is not None),
    )


def comparison_report(page: Page) -> Report:
    """What a terminal shows of a comparison: everything but the charts, and what is missing, which is on stderr."""
    blocks: list[Block] = [Paragraph(page.lead)]
    for section in page.sections:
        for block in section.blocks if section.title != _NOT_SHOWN else ():
            if isinstance(block, Items):
                blocks += [Paragraph(line) for line in block.lines]
            elif isinstance(block, Block):
                blocks.append(block)
    return Report(page.title, tuple(blocks))


def problems(runs: Sequence[Compared]) -> list[str]:
    """What the folders lack, one line each."""
    return [f"{each.label}: {problem}" for each in runs for problem in each.run.problems]


def _problems(runs: Sequence[Compared]) -> Section | None:
    lines = tuple((problem,) for problem in problems(runs))
    return Section(_NOT_SHOWN, (Items(lines),)) if lines else None


def _overview(runs: Sequence[Compared]) -> Table:
    rows: list[tuple[Line, ...]] = []
    for each in runs:
        run = each.run
        recipe = (run.summary or {}).get("recipe") or run.settings.get("recipe.name") or "not known"
        planned = f" of {run.planned_updates}" if run.planned_updates is not None else ""
        state = _state(run)
        toned = Toned(state, Tone.BAD) if state == "failed" else state
        where = shortest(run.folder.path)
        rows.append(((each.label,), (toned,), (str(recipe)[:40],), (f"{run.updates}{planned}",), (where,)))
    columns = (
        Column("run"), Column("state"), Column("recipe"), Column("updates", numeric=True), Column("folder", wraps=True),
    )  # fmt: skip
    return Table(columns, tuple(rows), "Runs")


def _state(run: RunFiles) -> str:
    if run.is_running:
        return "running"
    if run.has_ended:
        return "finished"
    return "failed" if run.failure is not None else "not finished"


def _outcomes(runs: Sequence[Compared]) -> Iterator[Line]:
    for each in runs:
        yield (f"{each.label}: ", *outcome(each.run))
        if each.run.failure is not None and not each.run.is_running:
            message = str(each.run.failure.get("message") or "(without a message)")
            yield (f"{each.label} failed: ", Toned(message[:1000], Tone.BAD))


def _settings(runs: Sequence[Compared]) -> Iterator[PageBlock]:
    known = [each.letter for each in runs if each.run.settings]
    if (table := settings_table(runs)) is not None:
        yield table
    elif len(known) > 1:
        yield Paragraph((f"{listed(known)} have the same settings.",))
    else:
        yield Paragraph((Toned("Fewer than two of the folders have settings.json.", _FAINT),))
    if (table := versions_table(runs)) is not None:
        yield table


def _measures(runs: Sequence[Compared], *, comparable: bool) -> Iterator[PageBlock]:
    rows = tuple(_measured(each, metric) for metric in METRICS for each in runs if _is_measured(each.run))
    if not rows:
        yield Paragraph((Toned("No run has been evaluated.", _FAINT),))
        return
    numbers = [Column(name, numeric=True) for name in ("before", "after", "change")]
    yield Table(
        (Column("metric"), Column("run"), *numbers, Column("")),
        rows,
        "Before and after",
        "TV: total variation; KL and entropy in nats per token; ROUGE-L: F1, 0 to 1. ±: one standard error over prompts. "
        f"Change: paired by prompt, with {SIGNIFICANT:g} standard errors to either side, which is an interval of about "
        f"95 %; a star marks one without 0.{_unfinished(runs)}",
    )
    if comparable:
        yield from _differences(runs)


def _is_measured(run: RunFiles) -> bool:
    return run.before is not None or run.newest is not None


def _unfinished(runs: Sequence[Compared]) -> str:
    """Which update "after" is, where a run has not been evaluated after training."""
    points = [
        f"update {each.run.during[-1].update} for {each.letter}"
        for each in runs
        if each.run.after is None and each.run.during
    ]
    return f" After: {listed(points)}." if points else ""


def _measured(each: Compared, metric: str) -> tuple[Line, ...]:
    found = each.run.paired.get(metric)
    before, after = (_cell(metric, evaluation) for evaluation in (each.run.before, each.run.newest))
    told = verdict(metric, *found) if found is not None else ()
    return ((LABELS[metric],), (each.label,), before, after, _interval(found), told)


def _cell(metric: str, evaluation: Evaluation | None) -> Line:
    return estimated(metric, *(evaluation.estimate(metric) if evaluation is not None else (None, None)))


def _interval(estimate: Estimate | None) -> Line:
    if estimate is None or not np.isfinite(estimate.value):
        return (Toned("not measured", _FAINT),)
    if not np.isfinite(estimate.stderr):
        return (f"{estimate.value:+.4f}",)
    room = SIGNIFICANT * estimate.stderr
    low, high = estimate.value - room, estimate.value + room
    return (Interval(estimate.value, low, high, significant=abs(estimate.value) > room),)


def _differences(runs: Sequence[Compared]) -> Iterator[PageBlock]:
    """How far the other runs are from the first after training, on the prompts that both measured."""
    first, *others = runs
    found = {other.label: _between(first.run, other.run) for other in others}
    for label, between in found.items():
        if isinstance(between, str):
            yield Paragraph((f"{label} is not compared with {first.label}, because {between}.",))
    rows: list[tuple[Line, ...]] = []
    for metric in METRICS:
        for label, between in found.items():
            if isinstance(between, str) or metric not in between:
                continue
            estimate = between[metric]
            rows.append(((LABELS[metric],), (label,), _interval(estimate), verdict(metric, *estimate)))
    if rows:
        yield Table(
            (
                Column("metric"),
                Column("run"),
                Column(f"difference from {first.letter}", numeric=True),
                Column(""),
            ),
            tuple(rows),
            f"After training, compared with {first.label}",
            "Differences are paired by prompt, with intervals as above. They cover the choice of prompts and not that of "
            "seeds: one run each does not show that a setting is better, and `distill study` compares over seeds.",
        )


def _between(first: RunFiles, other: RunFiles) -> dict[str, Estimate] | str:
    """Metric -> difference of the newest evaluations; or why they are missing, as a clause."""
    if first.newest is None or other.newest is None:
        return "one of them has not been evaluated since training began"
    try:
        return paired_difference(first.newest, other.newest)
    except READ_ERRORS:
        return "they were not measured on the same held-out prompts"


def _lead(runs: Sequence[Compared], reasons: Sequence[str]) -> Line:
    """What came out, in one sentence."""
    if reasons:
        return (f"The measures of these runs cannot be compared. {reasons[0]}",)
    first, *others = runs
    metric = "teacher_text.tv"
    clauses: list[str] = []
    for other in others:
        between = _between(first.run, other.run)
        estimate = None if isinstance(between, str) else between.get(metric)
        start = first.run.newest.value(metric) if first.run.newest is not None else 0.0
        if estimate is None or not start > 0 or not np.isfinite(sum(estimate)):
            clauses.append(f"{other.label} has not been compared with it")
            continue
        if abs(estimate.value) <= SIGNIFICANT * estimate.stderr:
            clauses.append(f"{other.label} is as near to the teacher, within the noise")
        else:
            where = "farther from" if estimate.value > 0 else "nearer to"
            share = 100 * abs(estimate.value) / start
            clauses.append(f"{other.label} is {share:.0f} % {where} the teacher")
    return (f"Compared with {first.label}, on the teacher's text (total variation): {'; '.join(clauses)}.",)


def _answers(runs: Sequence[Compared]) -> Iterator[PageBlock]:
    """Prompts that at least two runs have, with all answers to them."""
    answers = {each.label: _by_prompt(each.run) for each in runs}
    prompts = dict.fromkeys(prompt for own in answers.values() for prompt in own)
    shared = [prompt for prompt in prompts if sum(prompt in own for own in answers.values()) > 1]
    for number, prompt in enumerate(shared[:MOST_SAMPLES], start=1):
        told: dict[str, dict[str, list[str]]] = {}
        for label, own in answers.items():
            for who, text in own.get(prompt, {}).items():
                told.setdefault(who, {}).setdefault(text, []).append(label)
        shown = tuple(
            (who if len(texts) == 1 and len(labels) > 1 else f"{who}, {listed(labels)}", text)
            for who, texts in told.items()
            for text, labels in texts.items()
        )
        yield Sample(f"prompt {number}, answered greedily", prompt, shown)
    if len(shared) > MOST_SAMPLES:
        yield Paragraph((f"{len(shared) - MOST_SAMPLES} more prompts are left out.",))
    if alone := len(prompts) - len(shared):
        yield Paragraph((f"Prompts that only one run has are left out: {alone}.",))
    if not prompts:
        yield Paragraph((Toned("No run has kept answers.", _FAINT),))


def _by_prompt(run: RunFiles) -> dict[str, dict[str, str]]:
    """Prompt -> who answered -> the answer."""
    found: dict[str, dict[str, str]] = {}
    for rows in zip_longest(run.answers.get("before", []), run.answers.get("after", [])):
        for when, row in zip(("before", "after"), rows, strict=True):
            if row is not None:
                own = found.setdefault(row["prompt"], {})
                own.setdefault("teacher", row["teacher"])
                own.setdefault(f"student {when}", row["student"])
    return found


def _curves(runs: Sequence[Compared]) -> list[PageBlock]:
    charts = {each.label: [*evaluation_charts(each.run), *update_charts(each.run)] for each in runs}
    return list(overlaid(charts)) or [Paragraph((Toned("No run has made an update.", _FAINT),))]


def _stages(runs: Sequence[Compared]) -> Iterator[PageBlock]:
    yield Items(tuple(stage_lines(runs)))
    charts = {
        each.label: [chart for chart in (busy_chart(each.run), seconds_chart(each.run)) if chart is not None]
        for each in runs
    }
    yield from overlaid(charts)


def _alarms(runs: Sequence[Compared]) -> Iterator[PageBlock]:
    rows: list[tuple[Line, ...]] = []
    quiet: list[str] = []
    for each in runs:
        alarms = [event for event in each.run.events if event["event"] == "alarm"]
        if not alarms and each.run.events:
            quiet.append(each.label)
        for event in alarms[-MOST_ALARMS:]:
            update = number_in(event, "update")
            at = f"{update:.0f}" if update is not None else "not known"
            rows.append(((each.label,), (at,), (Toned(str(event.get("message"))[:1000], Tone.BAD),)))
    if rows:
        columns = (Column("run"), Column("update", numeric=True), Column("alarm", wraps=True))
        yield Table(columns, tuple(rows), "Alarms")
    if quiet:
        yield Paragraph((f"No alarm was raised in {listed(quiet)}.",))
    if not rows and not quiet:
        yield Paragraph((Toned("No events are known.", _FAINT),))
