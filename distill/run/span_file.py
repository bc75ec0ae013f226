"""``spans.jsonl`` in a run folder: the spans of a run, one JSON object per line, append-only.

The driver writes it once per update, and it can be read at any time. There are three kinds of lines. Each start of
the run begins with ``{"spans_format": 1, "incarnation": 2}``. A line with ``spans`` has the spans of one process since
its last line, by column, and ``dropped``, the number of those that were not kept. A line with ``counters`` has
numbers of the replay after an update.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.files import LineFile, LineReader, whole_number
from distill.replay.spans import FIELDS, TABLES, SpanKind, SpanOutcome

FORMAT = 1
MOST_BYTES = 1 << 28
"""Size after which no more spans are written; the rest is counted. It is enough for three million trajectories."""
_WHOLE = tuple(name for name in FIELDS if name not in ("start_ns", "end_ns"))
_COLUMNS = (*_WHOLE, "start_us", "duration_us")
"""Times in the file are microseconds. ``start_us`` counts from the line's ``base_us``, which counts from 1970."""


class SpanFile:
    """Appends to the file of a run."""

    def __init__(self, path: Path, incarnation: int, most_bytes: int = MOST_BYTES) -> None:
        self._lines = LineFile(path)
        self._most_bytes = most_bytes
        self._num_dropped = 0
        """Spans that the file has no room for, and that no line has named yet."""
        self._append({"spans_format": FORMAT, "incarnation": incarnation})

    def write(self, drained: Mapping[str, Any]) -> None:
        """Append what :meth:`distill.replay.spans.SpanBuffer.drain` returned."""
        values = array("q")
        values.frombytes(drained["values"])
        num_spans, num_dropped = len(values) // len(FIELDS), drained["num_dropped"]
        if not num_spans and not num_dropped:
            return
        columns = {name: values[place :: len(FIELDS)].tolist() for place, name in enumerate(FIELDS)}
        starts, ends = ([ns // 1000 for ns in columns[name]] for name in ("start_ns", "end_ns"))
        base = min(starts, default=0)
        spans: dict[str, list[int] | int] = {name: _short(columns[name]) for name in _WHOLE}
        spans["start_us"] = [start - base for start in starts]
        spans["duration_us"] = [end - start for start, end in zip(starts, ends, strict=True)]
        line = {"base_us": base, "lanes": drained["lanes"], "dropped": num_dropped, "spans": spans}
        if not self._append(line):
            self._num_dropped += num_spans + num_dropped

    def counters(self, at_ns: int, update: int, counters: Mapping[str, float]) -> None:
        """Append numbers that describe the run after an update."""
        self._append({"at_us": at_ns // 1000, "update": update, "counters": dict(counters)})

    def close(self) -> None:
        if self._num_dropped:
            self._lines.append(json.dumps({"spans": None, "dropped": self._num_dropped}))
        self._lines.close()

    def _append(self, line: Mapping[str, Any]) -> bool:
        """Append a line if the file has room; returns whether it had."""
        text = json.dumps(line, separators=(",", ":"), allow_nan=False)
        has_room = "spans_format" in line or self._lines.num_bytes + len(text) < self._most_bytes
        if has_room:
            self._lines.append(text)
        return has_room


def _short(column: list[int]) -> list[int] | int:
    """A column, or the value that all its rows have."""
    return column[0] if column and column.count(column[0]) == len(column) else column


@dataclass(frozen=True)
class Started:
    """A start of the run."""

    incarnation: int


@dataclass(frozen=True)
class Counters:
    """Numbers of the run after an update."""

    at_us: int
    update: int
    values: dict[str, float]


@dataclass(frozen=True)
class Dropped:
    """Spans that were not kept."""

    num_spans: int


@dataclass(frozen=True, slots=True)
class Span:
    """A span with its names; see :data:`distill.replay.spans.FIELDS`. Times are microseconds since 1970."""

    kind: SpanKind
    lane: str
    table: str
    draw: int
    issue: int
    sample: int
    start_us: int
    end_us: int
    tokens: int
    version: int
    update: int
    outcome: SpanOutcome


class SpanReader(LineReader["Started | Span | Counters | Dropped"]):
    """Iterates over what a file has: the spans of each process in the order of their ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, self._of_line)
        self.foreign: str | None = None
        """The format of the first part that another version wrote; such parts are skipped."""
        self._is_ours = True

    def _of_line(self, line: Mapping[str, Any]) -> Iterator[Started | Span | Counters | Dropped]:
        if "spans_format" in line:
            self._is_ours = line["spans_format"] == FORMAT
            if not self._is_ours and self.foreign is None:
                self.foreign = str(line["spans_format"])[:20]
        if self._is_ours:
            yield from _parts(line)


def _parts(line: Mapping[str, Any]) -> Iterator[Started | Span | Counters | Dropped]:
    """What a line says. Raises: one of the errors above when it is not as :class:`SpanFile` writes it."""
    if "spans_format" in line:
        yield Started(whole_number(line["incarnation"]))
    elif "counters" in line:
        values = {str(name): float(value) for name, value in line["counters"].items()}
        if not all(map(math.isfinite, values.values())):
            raise ValueError("a counter is a finite number")
        yield Counters(whole_number(line["at_us"]), whole_number(line["update"]), values)
    else:
        yield from _spans(line) if line["spans"] is not None else ()
        if line["dropped"]:
            yield Dropped(whole_number(line["dropped"]))


def _spans(line: Mapping[str, Any]) -> Iterator[Span]:
    columns, base, lanes = line["spans"], whole_number(line["base_us"]), line["lanes"]
    num_spans = len(columns["start_us"])
    wide = (
        columns[name] if isinstance(columns[name], list) else [columns[name]] * num_spans for name in _COLUMNS
    )
    for row in zip(*wide, strict=True):
        kind, lane, table, draw, issue, sample, tokens, version, update, outcome, start, duration = map(
            whole_number, row
        )
        if min(lane, table, duration) < 0:
            raise ValueError("a span has a place, and does not end before it starts")
        yield Span(
            kind=SpanKind(kind),
            lane=str(lanes[lane]),
            table=TABLES[table],
            draw=draw,
            issue=issue,
            sample=sample,
            start_us=base + start,
            end_us=base + start + duration,
            tokens=tokens,
            version=version,
            update=update,
            outcome=SpanOutcome(outcome),
        )
