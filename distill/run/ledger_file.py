"""``ledger.jsonl`` in a run folder: which draws each update used, one JSON object per line, append-only.

The driver writes it, and it can be read at any time. Each time the training starts, anew or from a checkpoint, a line
``{"ledger_format": 1, "incarnation": 2, "updates_done": 8, "rows": {"student_text": 900, ...}}`` follows: what earlier
lines say of later updates is undone. A line ``{"update": 9, "student_text": [[draw, row, issue], ...], ...}`` has the
draws of an update, with the row that each selects and how often it had been issued before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.files import LineFile, LineReader, whole_number
from distill.interfaces import Lease
from distill.replay.spans import TABLES

FORMAT = 1


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


class LedgerReader(LineReader[LedgerStart | LedgerUpdate]):
    """Iterates over what a file has."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _entries)


def _entries(line: Mapping[str, Any]) -> Iterator[LedgerStart | LedgerUpdate]:
    """What a line says. Raises: one of the reader's errors when it is not as :class:`LedgerFile` writes it."""
    if "ledger_format" in line:
        if line["ledger_format"] != FORMAT:
            raise ValueError("another format")
        rows = {table: whole_number(line["rows"][table]) for table in TABLES}
        yield LedgerStart(whole_number(line["incarnation"]), whole_number(line["updates_done"]), rows)
    else:
        draws = {table: [Used(*map(whole_number, draw)) for draw in line[table]] for table in TABLES}
        yield LedgerUpdate(whole_number(line["update"]), draws)
