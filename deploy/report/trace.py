"""`distill trace`: the spans of a run as a trace for Perfetto.

A draw's slices wait in memory until its update is known, and its arrows lead from its rollout past its scoring to its
lease. So memory is bounded by the draws that the replay had at one time, and not by the length of the run.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from deploy.report.chrome_trace import ChromeTrace, Slice
from deploy.safe_text import strip_control
from distill.errors import ConfigError
from distill.files import replacing_file
from distill.replay.spans import NONE, SpanKind, SpanOutcome
from distill.run.folder import RunFolder
from distill.run.span_file import FORMAT, Counters, Dropped, Span, SpanReader, Started

TRACE = "trace.json"
"""The file's name in the run folder, unless another is named."""
TITLES = {
    SpanKind.ROLLOUT: "draws",
    SpanKind.SCORING: "scoring",
    SpanKind.READY: "ready",
    SpanKind.LEASE: "leases",
    SpanKind.LEASE_WAIT: "waits",
    SpanKind.UPDATE: "updates",
    SpanKind.WRITE: "weights",
    SpanKind.PUSH: "pushes",
    SpanKind.LOAD: "weights",
    SpanKind.EVALUATION: "evaluations",
    SpanKind.CHECKPOINT: "checkpoints",
}
"""The lanes of each kind."""
COUNTERS = (
    ("replay/student_text.", "replay", "student groups"),
    ("replay/teacher_text.", "replay", "teacher rows"),
    ("policy/age_", "learner", "policy age"),
)
"""How the names of counters begin, the process that shows them, and their title there."""
_ORDER = ("driver", "learner", "replay", "rollout", "teacher", "proxy")
_MEMBER = re.compile(r"([a-z]{1,20}-\d{1,9})\.\d{1,12}")
_LANES_OF_KIND = 100_000


@dataclass
class WrittenTrace:
    """What a trace contains."""

    path: Path
    num_spans: int = 0
    num_dropped: int = 0
    incarnations: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line per thing that the trace lacks."""


def write_trace(run_dir: str | Path, out: Path | None = None) -> WrittenTrace:
    """Write the trace of a run, into its folder unless another place is named.

    Raises: ConfigError when the folder is not a run's or has no spans that can be shown, and when the file cannot be
    written.
    """
    folder = RunFolder(run_dir)
    folder.require()
    _require_spans(folder)
    written = WrittenTrace(_place(folder, out))
    try:
        reader = SpanReader(folder.spans)
        with (
            replacing_file(written.path, durable=False) as temporary,
            _opened(temporary, written.path) as file,
        ):
            exporter = _Exporter(ChromeTrace(file), written)
            exporter.read(reader)
            _add_problems(written, folder, reader)
            exporter.close()
            if not written.num_spans:
                raise _nothing_to_show(folder, reader)
    except OSError as error:
        must = f"be a file that can be written ({error.strerror or error})"
        raise ConfigError("--out", written.path, must, "choose another file with --out") from error
    return written


def _place(folder: RunFolder, out: Path | None) -> Path:
    """Where the trace goes. Raises: ConfigError when another file could be there."""
    place = folder.path / TRACE if out is None else out
    remedy = "choose another file with --out"
    if not place.name.endswith((".json", ".json.gz")):
        raise ConfigError("--out", place, "end with .json or .json.gz", remedy)
    if place.absolute().parent.resolve() == folder.path.resolve() and not place.name.startswith("trace"):
        must = "begin with trace in the run folder, so that it replaces no file of the run"
        raise ConfigError("--out", place, must, remedy)
    return place


def _require_spans(folder: RunFolder) -> None:
    try:
        with folder.spans.open("rb"):
            return
    except FileNotFoundError:
        must = "be there: a run writes it while it trains, unless its version of distill is older than traces"
        remedy = "start a run with this version, or wait until this one trains"
    except OSError as error:
        must, remedy = f"be readable ({error.strerror})", "allow this user to read it"
    raise ConfigError("spans", folder.spans, must, remedy)


def _nothing_to_show(folder: RunFolder, reader: SpanReader) -> ConfigError:
    if reader.foreign is not None:
        must = f"have format {FORMAT} (it has {strip_control(reader.foreign)})"
        return ConfigError("spans", folder.spans, must, "use the version of distill that made the run")
    must = "have a span, and the run has made no update yet" if not reader.num_broken else "have a whole line"
    return ConfigError("spans", folder.spans, must, "try again after the next update")


def _add_problems(written: WrittenTrace, folder: RunFolder, reader: SpanReader) -> None:
    name = folder.spans.name
    if reader.num_broken:
        lines = "one line" if reader.num_broken == 1 else f"{reader.num_broken} lines"
        written.problems.append(
            f"{name} has {lines} that a crash or a running write cut; the others are shown"
        )
    if reader.foreign is not None:
        found = strip_control(reader.foreign)
        written.problems.append(f"a part of {name} has format {found}, of another version; it is not shown")
    if written.num_dropped:
        spans = "one span was" if written.num_dropped == 1 else f"{written.num_dropped} spans were"
        written.problems.append(f"{spans} dropped, because there was no room for them")
    try:
        is_running = folder.is_running
    except OSError:  # a file system without locks, or a lock of another user
        is_running = False
    if is_running:
        written.problems.append("the run is still being written; the trace ends with its last update")


@contextmanager
def _opened(temporary: Path, place: Path) -> Iterator[IO[str]]:
    """Open the file to write, compressed if its name ends in .gz."""
    if place.suffix == ".gz":
        with gzip.open(temporary, "wt", compresslevel=5, encoding="utf-8") as file:
            yield file
    else:
        with temporary.open("w", encoding="utf-8") as file:
            yield file


@dataclass
class _Drawn:
    """The slices of one draw that wait for its update, by sample."""

    issue: int
    rollouts: dict[int, tuple[Slice, Span]] = field(default_factory=dict)
    scorings: dict[int, tuple[Slice, Span]] = field(default_factory=dict)


class _Exporter:
    """Turns spans into events."""

    def __init__(self, trace: ChromeTrace, written: WrittenTrace) -> None:
        self._trace = trace
        self._written = written
        self._incarnation = 0
        self._draws: dict[tuple[str, int], _Drawn] = {}
        """By table and draw."""
        self._to_lease: dict[int, list[int]] = {}
        """Update -> arrows that end at its lease, which has no end yet."""
        self._leases: dict[int, Slice] = {}
        """Update -> its lease, until the update itself is found."""
        self._processes: dict[str, int] = {}
        """Name of a lane -> number of the process that has it."""
        self._last_us = 0

    def read(self, reader: SpanReader) -> None:
        for found in reader:
            match found:
                case Started():
                    self._start(found.incarnation)
                case Counters():
                    self._count(found)
                case Dropped():
                    self._written.num_dropped += found.num_spans
                    process = self._process("driver")
                    self._trace.mark(process, self._last_us, f"{found.num_spans} spans dropped")
                case Span():
                    self._add(found)

    def close(self) -> None:
        self._flush()
        facts = {
            "incarnations": self._written.incarnations,
            "spans": self._written.num_spans,
            "dropped": self._written.num_dropped,
            "problems": self._written.problems,
        }
        self._trace.close(facts)

    def _start(self, incarnation: int) -> None:
        """A start of the run: nothing continues over it, and draws in flight are issued anew."""
        self._flush()
        self._incarnation = incarnation
        self._written.incarnations.append(incarnation)

    def _flush(self) -> None:
        """Write the slices of draws whose update is not known."""
        for drawn in self._draws.values():
            self._write_draw(drawn, NONE)
        self._draws.clear()
        self._to_lease.clear()
        self._leases.clear()

    def _add(self, span: Span) -> None:
        self._written.num_spans += 1
        self._last_us = max(self._last_us, span.end_us)
        process = self._process(span.lane)
        order = span.kind * _LANES_OF_KIND
        where = self._trace.place(process, TITLES[span.kind], order, span.start_us, span.end_us)
        if span.kind in (SpanKind.ROLLOUT, SpanKind.SCORING) and span.outcome is SpanOutcome.DONE:
            self._keep(where, span)
            return
        self._write(where, span, span.update)
        if span.kind is SpanKind.READY:
            self._lead_to_lease(span)
        elif span.kind is SpanKind.LEASE:
            for arrow in self._to_lease.pop(span.update, ()):
                self._trace.arrow_at(arrow, "draw", "f", where)
            self._leases[span.update] = where
        elif span.kind is SpanKind.UPDATE:
            self._lead_to_update(where, span)

    def _keep(self, where: Slice, span: Span) -> None:
        key = (span.table, span.draw)
        drawn = self._draws.get(key)
        if drawn is None or drawn.issue != span.issue:
            if drawn is not None:  # that issue was dropped
                self._write_draw(drawn, NONE)
            drawn = self._draws[key] = _Drawn(span.issue)
        slices = drawn.rollouts if span.kind is SpanKind.ROLLOUT else drawn.scorings
        slices[span.sample] = (where, span)

    def _lead_to_lease(self, ready: Span) -> None:
        """Write a draw whose update is known. Its arrows end when the lease does."""
        drawn = self._draws.get((ready.table, ready.draw))
        if drawn is not None and drawn.issue == ready.issue:
            del self._draws[ready.table, ready.draw]
            self._to_lease.setdefault(ready.update, []).extend(self._write_draw(drawn, ready.update))

    def _lead_to_update(self, where: Slice, update: Span) -> None:
        lease = self._leases.pop(update.update, None)
        if lease is not None and lease.start_us <= where.start_us:  # clocks of two nodes can differ
            arrow = self._trace.arrow()
            self._trace.arrow_at(arrow, "update", "s", lease, at_us=lease.start_us)
            self._trace.arrow_at(arrow, "update", "f", where)

    def _write_draw(self, drawn: _Drawn, update: int) -> list[int]:
        """Write the slices of a draw, and the arrows between them; returns those that lead on to a lease."""
        leads_on = update != NONE
        arrows: list[int] = []
        for sample in sorted(drawn.rollouts.keys() | drawn.scorings.keys()):
            stops = [slices[sample] for slices in (drawn.rollouts, drawn.scorings) if sample in slices]
            for where, span in stops:
                self._write(where, span, update)
            if len(stops) + leads_on < 2:
                continue
            arrows.append(self._trace.arrow())
            for number, (where, _) in enumerate(stops):
                ends_here = number + 1 == len(stops) and not leads_on
                phase = "s" if number == 0 else "f" if ends_here else "t"
                self._trace.arrow_at(arrows[-1], "draw", phase, where)
        return arrows

    def _write(self, where: Slice, span: Span, update: int) -> None:
        arguments: dict[str, Any] = {"incarnation": self._incarnation}
        sample = {SpanKind.READY: "samples", SpanKind.LEASE: "groups"}.get(span.kind, "sample")
        numbers = {
            "update": update, "draw": span.draw, sample: span.sample, "tokens": span.tokens, "version": span.version,
        }  # fmt: skip
        arguments |= {name: value for name, value in numbers.items() if value != NONE}
        if span.issue > 0:
            arguments["issue"] = span.issue
        if span.outcome is not SpanOutcome.DONE:
            arguments["outcome"] = span.outcome.name.lower()
        if _MEMBER.fullmatch(span.lane):
            arguments["actor"] = span.lane
        self._trace.slice(where, span_name(span), span.kind.name.lower(), arguments)

    def _count(self, counters: Counters) -> None:
        groups: dict[tuple[str, str], dict[str, float]] = {}
        for name, value in counters.values.items():
            for prefix, member, title in COUNTERS:
                if name.startswith(prefix):
                    groups.setdefault((member, title), {})[name.removeprefix(prefix)] = value
        for (member, title), values in groups.items():
            self._trace.counters(self._process(member), counters.at_us, title, values)

    def _process(self, lane: str) -> int:
        if lane not in self._processes:
            match = _MEMBER.fullmatch(lane)
            name = match[1] if match else lane
            role, _, number = name.partition("-")
            rank = _ORDER.index(role) if role in _ORDER else len(_ORDER)
            order = rank * _LANES_OF_KIND + int(number) if number.isdecimal() else rank * _LANES_OF_KIND
            self._processes[lane] = self._trace.process(name, order)
        return self._processes[lane]


def span_name(span: Span) -> str:
    """The name of a slice."""
    draw = f"{'draw' if span.table == 'student_text' else 'text'} {span.draw}"
    version = f"version {span.version}" if span.version != NONE else "weights"
    match span.kind:
        case SpanKind.ROLLOUT:
            return draw
        case SpanKind.SCORING:
            return f"score {draw}"
        case SpanKind.READY:
            return f"{draw} is ready"
        case SpanKind.LEASE_WAIT:
            return f"wait for update {span.update}"
        case SpanKind.WRITE | SpanKind.PUSH | SpanKind.LOAD:
            return f"{span.kind.name.lower()} {version}"
        case _:
            return f"{span.kind.name.lower()} {span.update}"
