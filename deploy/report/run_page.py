"""The page of a run, from its folder alone: what came out, how it went, what it cost, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deploy.report.curves import (
    busy_chart,
    evaluation_charts,
    limit_timeline,
    mean_row_of,
    seconds_chart,
    stage_timeline,
    update_charts,
)
from deploy.report.html import html
from deploy.report.model import (
    Code,
    Column,
    Items,
    Line,
    Listing,
    Page,
    PageBlock,
    Paragraph,
    Section,
    Table,
    Tone,
    Toned,
)
from deploy.report.run_files import RunFiles, number_in, numbers_in
from deploy.report.run_report import best_line, comparison_table, outcome, samples, shortest, talk_line
from deploy.run.record import PAGE
from deploy.run.training.advice import advise
from deploy.run.training.clocks import held_back
from distill.errors import ConfigError
from distill.files import write_bytes

MOST_SAMPLES, MOST_EVENTS = 20, 60
_OF_NOTE = ("alarm", "best", "student_share", "teacher_checked", "started", "finished")
_IDENTITY = ("run_id", "copied_from", "incarnation", "fingerprint", "created_at", "started_at")
_WAITED = ("push_waited_for_evaluations", "update_waited_for_milestones")


def write_page(run: RunFiles, path: Path | None = None) -> Path:
    """Write the page of a run, into its folder unless another place is named; returns where it is.

    Raises: ConfigError when the file cannot be written there.
    """
    return write_html(run_page(run), run.folder.path / PAGE if path is None else path)


def write_html(page: Page, place: Path) -> Path:
    """Write a page into the file that --html names, or its default; returns where it is.

    Raises: ConfigError when the file cannot be written there.
    """
    remedy = "choose another file with --html"
    if place.suffix != ".html":
        raise ConfigError("--html", place, "end with .html, so that it replaces no other file", remedy)
    try:
        write_bytes(place, html(page).encode())
    except OSError as error:
        must = f"be a file that can be written ({error.strerror or error})"
        raise ConfigError("--html", place, must, remedy) from error
    return place


def run_page(run: RunFiles) -> Page:
    """The page of a run, as far as its folder allows."""
    sections = [
        Section("What is not shown", (Items(tuple((problem,) for problem in run.problems)),))
        if run.problems
        else None,
        _failure(run),
        _before_and_after(run),
        _section("Answers", _answers(run)),
        _section("Learning curves", [*evaluation_charts(run), *update_charts(run)]),
        _section("Stages", list(_stages(run))),
        _section("Cost", list(_cost(run))),
        _section("Alarms and events", list(_events(run))),
        _section("Configuration", [Listing("config.yaml", run.config)] if run.config is not None else []),
        _section("Versions", list(_versions(run))),
    ]
    return Page(
        title=f"Run {run.folder.path.name}",
        lead=outcome(run),
        sections=tuple(section for section in sections if section is not None),
    )


def _section(title: str, blocks: Sequence[PageBlock]) -> Section:
    return Section(
        title, tuple(blocks) or (Paragraph((Toned("The folder has nothing of this.", Tone.FAINT),)),)
    )


def _failure(run: RunFiles) -> Section | None:
    if run.failure is None or run.is_running:
        return None
    message = str(run.failure.get("message") or "(without a message)")
    lines: list[Line] = [(Toned(message, Tone.BAD),), ("continue it with: ", Code(run.folder.resume_command))]
    return Section("Why the run failed", (Items(tuple(lines)),))


def _before_and_after(run: RunFiles) -> Section:
    table = comparison_table(run)
    blocks: list[PageBlock] = [] if table is None else [table]
    if (line := best_line(run)) is not None:
        blocks.append(Paragraph(line))
    if run.folder.student.is_dir():
        blocks.append(Paragraph(talk_line(run)))
    return _section("Before and after", blocks)


def _answers(run: RunFiles) -> list[PageBlock]:
    every = samples(run)
    left_out = len(every) - MOST_SAMPLES
    more = [Paragraph((f"{left_out} more prompts are left out.",))] if left_out > 0 else []
    return [*every[:MOST_SAMPLES], *more]


def _stages(run: RunFiles) -> Iterator[PageBlock]:
    if (advice := advice_of(run)) is not None:
        yield Paragraph((sentence(advice),))
    timing = numbers_in(run.summary or {}, "timing_s")
    overlaps = number_in(run.settings, "replay.max_policy_age")
    if overlaps and {"training", *_WAITED} <= timing.keys():
        yield Paragraph((sentence(held_back(timing)),))
    for block in (busy_chart(run), limit_timeline(run), seconds_chart(run), stage_timeline(run)):
        if block is not None:
            yield block


def sentence(clause: str) -> str:
    """Return a clause, which has at least one character, as a sentence."""
    return f"{clause[0].upper()}{clause[1:]}."


def advice_of(run: RunFiles) -> str | None:
    """What the summary says about the whole training, or else what the updates so far say."""
    recorded = (run.summary or {}).get("advice")
    if isinstance(recorded, Mapping) and isinstance(text := recorded.get("text"), str) and text.strip():
        return text.strip()[:1000]
    advice = advise(mean_row_of(run), run.setup)
    return advice.text if advice is not None else None


def _cost(run: RunFiles) -> Iterator[Table | Paragraph]:
    summary = run.summary
    if summary is None:
        seconds = run.metrics.get("timing/update_s")
        if seconds is not None and len(seconds):
            total = float(seconds[seconds == seconds].sum())
            yield Paragraph(
                (f"{run.updates} updates so far, in {total / 60:.1f} minutes without evaluations.",)
            )
        return
    wall_s = number_in(summary, "wall_s") or 0.0
    incarnations = number_in(summary, "incarnations") or 1
    resumed = (
        f" The run was started {incarnations:.0f} times, and this is the last time."
        if incarnations > 1
        else ""
    )
    made = f"{run.updates} updates of recipe "
    yield Paragraph((made, Code(str(summary["recipe"])), f" in {wall_s / 60:.1f} minutes.{resumed}"))
    timing = numbers_in(summary, "timing_s")
    yield _numbers(
        "Seconds by activity",
        "seconds",
        {name: seconds for name, seconds in timing.items() if seconds or name in ("training", "evaluation")},
        1,
        "Seconds of actors (… busy) add up over the actors of a pool and overlap with those of the run's stages.",
    )
    tokens = numbers_in(summary, "tokens")
    if tokens:
        yield _numbers("Tokens", "tokens", tokens, 0)
    peaks = numbers_in(summary, "peak_pss_bytes")
    if peaks:
        gib = {name: value / 2**30 for name, value in peaks.items()}
        note = "PSS: shared memory is divided among the processes that share it."
        yield _numbers("Peak memory by role", "GiB", gib, 2, note)


def _numbers(title: str, unit: str, values: Mapping[str, float], digits: int, note: str = "") -> Table:
    rows = tuple(
        ((name.replace("_", " "),), (f"{value:,.{digits}f}",)) for name, value in sorted(values.items())
    )
    return Table((Column("what"), Column(unit, numeric=True)), rows, title=title, note=note)


def _events(run: RunFiles) -> Iterator[Table | Paragraph]:
    noted = [event for event in run.events if event["event"] in _OF_NOTE]
    if not any(event["event"] == "alarm" for event in noted):
        yield Paragraph(("No alarm was raised.",) if run.events else ("No events are known.",))
    if not noted:
        return
    others = len([event for event in noted if event["event"] != "alarm"])
    rows: list[tuple[Line, ...]] = []
    for event in noted:
        name = str(event["event"])
        if name != "alarm":
            others -= 1
            if others >= MOST_EVENTS:
                continue
        toned = Toned(name, Tone.BAD) if name == "alarm" else name.replace("_", " ")
        rows.append(((str(event.get("time"))[:19].replace("T", " "),), (toned,), (_told(event),)))
    rows = rows[-2 * MOST_EVENTS :]
    note = f"The earliest of {len(noted)} events are left out." if len(rows) < len(noted) else ""
    yield Table((Column("time (UTC)"), Column("event"), Column("what")), tuple(rows), "Events of note", note)


def _told(event: Mapping[str, object]) -> str:
    """What an event says, in one line."""
    if isinstance(message := event.get("message"), str):
        at = number_in(event, "update")
        return (f"update {at:.0f}: " if at is not None else "") + message[:1000]
    parts = [
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in event.items()
        if name not in ("time", "event", "versions") and isinstance(value, str | int | float)
    ]
    return ", ".join(parts)[:1000]


def _versions(run: RunFiles) -> Iterator[Table | Paragraph]:
    starts = [event for event in run.events if event["event"] == "started"]
    versions = starts[-1].get("versions") if starts else None
    if isinstance(versions, Mapping):
        rows = tuple(((str(name)[:60],), (str(value)[:60],)) for name, value in list(versions.items())[:40])
        yield Table((Column("package"), Column("version")), rows, "Versions at the last start")
    else:
        yield Paragraph((Toned("The run has recorded no versions.", Tone.FAINT),))
    facts = [f"{name.replace('_', ' ')} {run.identity[name]}" for name in _IDENTITY if name in run.identity]
    if facts:
        yield Paragraph((f"{', '.join(facts)}, in ", Code(shortest(run.folder.path))))
