"""Records of a run: numbers per update, and events.

The driver writes them, and they can be read at any time. Names are ``<part>/<what>``
with a part of :data:`PARTS`; names of seconds, and of rates per second, end in ``_s``.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import ConfigError, first_line
from distill.files import LineFile, LineReader, plain, write_bytes
from distill.redaction import redacted_values
from distill.room import NoSpace
from distill.run.folder import RunFolder

ReportFacts = Callable[..., None]
"""Takes keyword facts about what a process does, for the live line."""

MOST_WAITING = 1000
"""Events that wait for room; of more, the oldest are dropped."""

PARTS = ("rollout", "teacher", "replay", "learner", "critic", "policy", "weights", "timing")
_NAME = re.compile(rf"(?:{'|'.join(PARTS)})/[a-z0-9_]+(?:[./][a-z0-9_]+)*")


def name_violations(names: Iterable[str]) -> list[str]:
    """Return the names that break the rule of this module. For tests of code that produces metrics."""
    return [
        name
        for name in names
        if not _NAME.fullmatch(name) or (name.startswith("timing/") and not name.endswith("_s"))
    ]


_AHEAD = re.compile(
    r"replay/(teacher_text\.[a-z]+|bytes|num_cache_hits|num_cached_rows|num_evicted_rows)|teacher/num_(bytes|texts|tokens)|(rollout|teacher)/num_(failures|diverted)"
)
"""These depend on how far ahead the teacher has scored at the moment a row is written, or on what has failed."""


def is_reproducible(name: str) -> bool:
    """Return whether a metric depends only on the run and not on the speed of the machine."""
    is_time = name.startswith("timing/") or name.endswith(("_s", "/busy_share"))
    return not (is_time or _AHEAD.fullmatch(name))


def reproducible(table: pa.Table) -> pa.Table:
    """Select the columns that are equal to the last bit in two equal runs in lock-step."""
    return table.select([name for name in table.column_names if is_reproducible(name)])


def read_metrics(run_dir: str | Path) -> pa.Table:
    """Read the present ``metrics.parquet``; the table has no rows if there is no file yet."""
    path = RunFolder(run_dir).metrics
    if not path.is_file():
        return _empty()
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        must, remedy = f"be a Parquet file ({first_line(error)})", "bring it back from a copy, or remove it"
        raise ConfigError("metrics", path, must, remedy) from None
    return table


class MetricsWriter:
    """Writes one row per update to ``metrics.parquet``, which is always a complete, readable file.

    ``update`` counts the updates done: 1 in the first row. Rows since the last rewrite are only in
    memory, so call ``flush`` before a checkpoint becomes durable; otherwise a resumed run lacks them.
    The file is rewritten at most every ``interval_s`` seconds, and rarely enough that rewriting takes
    at most a twentieth of the time however long the file grows. While the disk has no room for it, the rows stay in
    memory.
    """

    def __init__(
        self, run_dir: str | Path, interval_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ):
        self.path = RunFolder(run_dir).metrics
        self._interval_s = interval_s
        self._clock = clock
        self._written = read_metrics(run_dir)
        self._pending: list[dict[str, float | int | None]] = []
        self._last_update = _last(self._written)
        self._next_write = clock() + interval_s
        self._stale = False

    def write(self, update: int, values: Mapping[str, float | None]) -> None:
        """Add the row of an update. Where a row lacks a name that others have, its value is null.

        Raises: ValueError when a row of this update or a later one exists.
        """
        if self._last_update is not None and update <= self._last_update:
            raise ValueError(
                f"update={update} must be > {self._last_update}, the last row's; "
                "call truncate(updates_done) first in a resumed run"
            )
        row: dict[str, float | int | None] = {"update": int(update)}
        row |= {name: None if value is None else float(value) for name, value in values.items()}
        self._pending.append(row)
        self._last_update = update
        self._stale = True
        if self._clock() >= self._next_write:
            with suppress(NoSpace):  # they are in memory, and a flush before a checkpoint says it
                self._next_write = self._clock() + self._interval_s
                self.flush()

    def truncate(self, updates_done: int) -> None:
        """Drop the rows after ``updates_done``, because those updates are repeated."""
        table = self._table()
        keep = pa.array([update <= updates_done for update in table["update"].to_pylist()], pa.bool_())
        self._written = table.filter(keep)
        self._pending.clear()
        self._last_update = _last(self._written)
        self._stale = True
        self.flush()

    def flush(self) -> None:
        """Write all rows to the file, where they are readable and survive a crash. Raises: NoSpace; it may be repeated."""
        if not self._stale:
            return
        started = self._clock()
        self._written = self._table()
        self._pending.clear()
        sink = pa.BufferOutputStream()
        pq.write_table(self._written, sink)
        write_bytes(self.path, sink.getvalue().to_pybytes())
        self._stale = False
        now = self._clock()
        self._next_write = now + max(self._interval_s, 20 * (now - started))

    def close(self) -> None:
        self.flush()

    def _table(self) -> pa.Table:
        if not self._pending:
            return self._written
        names = {name for row in self._pending for name in row} - {"update"}
        new = pa.table(
            {"update": pa.array([row["update"] for row in self._pending], pa.int64())}
            | {name: pa.array([row.get(name) for row in self._pending], pa.float64()) for name in names}
        )
        table = pa.concat_tables([self._written, new], promote_options="default").combine_chunks()
        return table.select(["update", *sorted(set(table.column_names) - {"update"})])


def _empty() -> pa.Table:
    return pa.table({"update": pa.array([], pa.int64())})


def _last(table: pa.Table) -> int | None:
    return table["update"][-1].as_py() if table.num_rows else None


class EventLog:
    """``events.jsonl``: what happened and when, one JSON object per line, append-only.

    Safe to use from several threads. Opening the log ends a line that a crash cut, and
    :func:`read_events` skips such a line. Events for which the disk has no room are written with a later one.
    """

    def __init__(self, run_dir: str | Path):
        """Raises: NoSpace when there is no room for a new file."""
        self.path = RunFolder(run_dir).events
        self._lines = LineFile(self.path)
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)
        self._guard = threading.Lock()

    def write(self, event: str, **fields: Any) -> None:
        """Append one event without credentials, which every reader sees once this returns, unless the disk is full."""
        if reserved := {"time", "event"} & fields.keys():
            raise ValueError(f"field {min(reserved)} is reserved for the log; choose another name")
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        written = redacted_values(plain({"time": stamp, "event": event, **fields}))
        with self._guard:
            self._waiting.append(json.dumps(written, allow_nan=False))
            self._write_waiting()

    def close(self) -> None:
        with self._guard:
            self._write_waiting()
        self._lines.close()

    def _write_waiting(self) -> None:
        with suppress(NoSpace):  # an event is no reason to end a run
            while self._waiting:
                self._lines.append(self._waiting[0])
                self._waiting.popleft()


def read_events(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events so far, oldest first."""
    path = RunFolder(run_dir).events
    if path.is_file():
        yield from LineReader(path, lambda event: [event])
