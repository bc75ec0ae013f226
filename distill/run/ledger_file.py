"""``ledger.jsonl`` in a run folder: which draws each update used, one JSON object per line, append-only.

The driver writes it, and it can be read at any time. Each time the training starts, anew or from a checkpoint, a line
``{"ledger_format": 1, "incarnation": 2, "updates_done": 8, "rows": {"student_text": 900, ...}}`` follows: what earlier
lines say of later updates is undone. A line ``{"update": 9, "student_text": [[draw, row, issue], ...], ...}`` has the
draws of an update, with the row that each selects and how often it had been issued before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.files import LineFile
from distill.interfaces import Lease

FORMAT = 1
TABLES = ("student_text", "teacher_text")


class LedgerFile:
    """Appends to the file of a run."""

    def __init__(self, path: Path, incarnation: int, rows: Mapping[str, int]) -> None:
        """``rows``: of the tables from which the draws select."""
        self._lines = LineFile(path)
        self._incarnation = incarnation
        self._rows = dict(rows)

    def start(self, updates_done: int) -> None:
        """Record that the training starts from a checkpoint with these updates."""
        self._append(
            {
                "ledger_format": FORMAT,
                "incarnation": self._incarnation,
                "updates_done": updates_done,
                "rows": self._rows,
            }
        )

    def update(self, updates_done: int, lease: Lease) -> None:
        """Record an update by its number, counted from 1, and its lease."""
        draws: dict[str, list[list[int]]] = {table: [] for table in TABLES}
        for group in lease.groups:
            draws[group.draw.table].append([group.draw.number, group.draw.index, group.draw.issue])
        self._append({"update": updates_done, **draws})

    def sync(self) -> None:
        """Make every line durable."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(line, separators=(",", ":")))


@dataclass(frozen=True)
class Used:
    """A draw in an update."""

    number: int
    row: int
    issue: int


@dataclass(frozen=True)
class LedgerStart:
    """A start of the training."""

    incarnation: int
    updates_done: int
    rows: dict[str, int]


@dataclass(frozen=True)
class LedgerUpdate:
    """An update and its draws by table."""

    update: int
    draws: dict[str, list[Used]]


@dataclass
class LedgerReader:
    """Iterates over what a file has, line by line, without trust."""

    path: Path
    num_broken: int = field(default=0, init=False)
    """Lines that a crash cut, or that are not as :class:`LedgerFile` writes them."""

    def __iter__(self) -> Iterator[LedgerStart | LedgerUpdate]:
        """Raises: OSError."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    found = _entry(json.loads(text))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    self.num_broken += bool(text.strip())
                    continue
                yield found


def _entry(line: Mapping[str, Any]) -> LedgerStart | LedgerUpdate:
    """Raises: one of the errors above when a line is of another kind."""
    if "ledger_format" in line:
        if line["ledger_format"] != FORMAT:
            raise ValueError("another format")
        rows = {table: _whole(line["rows"][table]) for table in TABLES}
        return LedgerStart(_whole(line["incarnation"]), _whole(line["updates_done"]), rows)
    draws = {table: [Used(*map(_whole, draw)) for draw in line[table]] for table in TABLES}
    return LedgerUpdate(_whole(line["update"]), draws)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} must be a whole number >= 0")
    return value
