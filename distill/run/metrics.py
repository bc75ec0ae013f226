"""Records of a run: numbers per update, and events.

Written by the learner and the driver, read at any time. Names are
``<part>/<what>`` with a part of :data:`PARTS`; seconds, and rates per second, end in ``_s``.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.files import plain, write_bytes

PARTS = ("rollout", "teacher", "replay", "critic", "policy", "weights", "timing")
_NAME = re.compile(rf"(?:{'|'.join(PARTS)})/[a-z0-9_]+(?:[./][a-z0-9_]+)*")


def name_violations(names: Iterable[str]) -> list[str]:
    """The names that break the rule of this module: for tests of whoever makes metrics."""
    return [
        name
        for name in names
        if not _NAME.fullmatch(name) or (name.startswith("timing/") and not name.endswith("_s"))
    ]


_AHEAD = re.compile(
    r"replay/(teacher_text\.[a-z]+|bytes|num_cache_hits|num_cached_rows|num_evicted_rows)|teacher/num_tokens"
)
"""How far the teacher is ahead: text of the next update is scored, or not yet, when a row is written."""


def is_reproducible(name: str) -> bool:
    """Whether a metric depends on the run alone, not on how fast the machine was."""
    return not (name.startswith("timing/") or name.endswith("_s") or _AHEAD.fullmatch(name))


def reproducible(table: pa.Table) -> pa.Table:
    """The columns that two equal runs in lock-step agree on, to the last bit."""
    return table.select([name for name in table.column_names if is_reproducible(name)])


def read_metrics(run_dir: str | Path) -> pa.Table:
    """``metrics.parquet`` as it is now; no rows where there is none yet."""
    path = Path(run_dir) / "metrics.parquet"
    return pq.ParquetFile(path).read() if path.is_file() else _empty()


class MetricsWriter:
    """One row per update in ``metrics.parquet``, which is always a whole, readable file.

    ``update`` counts the updates done: 1 in the first row. Rows since the last rewrite are in
    memory only; ``flush`` before a checkpoint is made durable, so that a resumed run lacks none.
    The file is rewritten at most every ``interval_s``, and so seldom that this stays a
    twentieth of the time however long it grows.
    """

    def __init__(
        self, run_dir: str | Path, interval_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ):
        self.path = Path(run_dir) / "metrics.parquet"
        self._interval_s = interval_s
        self._clock = clock
        self._written = read_metrics(run_dir)
        self._pending: list[dict[str, float | int | None]] = []
        self._last_update = _last(self._written)
        self._next_write = clock() + interval_s
        self._stale = False

    def write(self, update: int, values: Mapping[str, float | None]) -> None:
        """Add the row of an update. A name may be new, or missing: null in the other rows.

        Raises: ValueError when there is a row of this update or a later one.
        """
        if self._last_update is not None and update <= self._last_update:
            raise ValueError(
                f"update={update} must be > {self._last_update}, the last row's; "
                "a resumed run calls truncate(updates_done) first"
            )
        row: dict[str, float | int | None] = {"update": int(update)}
        row |= {name: None if value is None else float(value) for name, value in values.items()}
        self._pending.append(row)
        self._last_update = update
        self._stale = True
        if self._clock() >= self._next_write:
            self.flush()

    def truncate(self, updates_done: int) -> None:
        """Drop the rows after ``updates_done``: those updates are made again."""
        table = self._table()
        keep = pa.array([update <= updates_done for update in table["update"].to_pylist()], pa.bool_())
        self._written = table.filter(keep)
        self._pending.clear()
        self._last_update = _last(self._written)
        self._stale = True
        self.flush()

    def flush(self) -> None:
        """Make every row readable, and safe from a crash."""
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
    """``events.jsonl``: what happened and when, one JSON object a line, only ever appended.

    Safe from several threads. A line that a crash cut is closed on opening and left out by
    :func:`read_events`.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / "events.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._guard = threading.Lock()
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; in the file, for every reader, when this returns."""
        if reserved := {"time", "event"} & fields.keys():
            raise ValueError(f"field {min(reserved)} is taken by the log; give it another name")
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = memoryview(
            (json.dumps(plain({"time": stamp, "event": event, **fields}), allow_nan=False) + "\n").encode()
        )
        with self._guard:
            while line:
                line = line[os.write(self._file, line) :]

    def close(self) -> None:
        os.close(self._file)


def read_events(run_dir: str | Path) -> Iterator[dict[str, Any]]:
    """The events so far, oldest first."""
    path = Path(run_dir) / "events.jsonl"
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue
