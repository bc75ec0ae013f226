"""Chrome's trace event format, written as the events come: Perfetto and chrome://tracing read it.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Times are whole
microseconds since 1970, which are exact in every program that reads JSON. A viewer shows a *process* as a group of
lanes, and a *thread* as one lane, whose slices must not overlap.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any


@dataclass(frozen=True, slots=True)
class Slice:
    """A span with its lane."""

    process: int
    thread: int
    start_us: int
    end_us: int


class Lanes:
    """Distributes spans over as few lanes as possible, so that none overlaps another of its lane.

    A span takes the lane that became free last before it begins. If the spans come in the order of their ends, this
    needs no more lanes than spans overlap at one time, and in another order it may need more.
    """

    def __init__(self) -> None:
        self._free: list[tuple[int, int]] = []
        """(end of the last span, lane) in ascending order."""

    def place(self, start_us: int, end_us: int) -> int:
        """Return the lane of a span, from 0."""
        place = bisect_right(self._free, (start_us, sys.maxsize))
        lane = self._free.pop(place - 1)[1] if place else len(self._free)
        insort(self._free, (end_us, lane))
        return lane


class ChromeTrace:
    """Writes a trace. It keeps names and lanes in memory, and no events."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[int, str, int], int] = {}
        self._lanes: dict[tuple[int, str], Lanes] = {}
        self._num_arrows = 0
        self._separator = '{"displayTimeUnit":"ms","traceEvents":[\n'

    def process(self, name: str, order: int) -> int:
        """Return the number of a process. Viewers show processes by ascending ``order``."""
        if name not in self._processes:
            number = self._processes[name] = len(self._processes) + 1
            self._name("process", number, number, name, order)
        return self._processes[name]

    def place(self, process: int, title: str, order: int, start_us: int, end_us: int) -> Slice:
        """Find a lane for a span among those of a process with the same title."""
        lane = self._lanes.setdefault((process, title), Lanes()).place(start_us, end_us)
        key = (process, title, lane)
        if key not in self._threads:
            # Some viewers mistake a thread with the number of its process for the main one.
            number = self._threads[key] = 100_000 + len(self._threads)
            self._name("thread", process, number, f"{title} {lane + 1}" if lane else title, order + lane)
        return Slice(process, self._threads[key], start_us, end_us)

    def slice(self, where: Slice, name: str, category: str, arguments: Mapping[str, Any]) -> None:
        duration = where.end_us - where.start_us
        self._event(
            "X",
            where.process,
            where.thread,
            where.start_us,
            dur=duration,
            name=name,
            cat=category,
            args=arguments,
        )

    def arrow(self) -> int:
        """Return the number of a new arrow, for :meth:`arrow_at`."""
        self._num_arrows += 1
        return self._num_arrows

    def arrow_at(self, arrow: int, name: str, phase: str, where: Slice, at_us: int | None = None) -> None:
        """Lead an arrow from a slice (``phase`` "s"), past one ("t"), or to one ("f").

        ``at_us``: a time within the slice; by default its end for "s", and its start otherwise. An event of an arrow
        belongs to the slice that is open at its time and was written before it.
        """
        if at_us is None:
            at_us = max(where.start_us, where.end_us - 1) if phase == "s" else where.start_us
        binding = {"bp": "e"} if phase == "f" else {}
        self._event(phase, where.process, where.thread, at_us, name=name, cat="flow", id=arrow, **binding)

    def counters(self, process: int, at_us: int, name: str, values: Mapping[str, float]) -> None:
        self._event("C", process, process, at_us, name=name, args=values)

    def mark(self, process: int, at_us: int, name: str) -> None:
        """Draw a line over the whole trace."""
        self._event("i", process, process, at_us, s="g", name=name)

    def close(self, facts: Mapping[str, Any]) -> None:
        """End the trace with some facts about it."""
        head = self._separator if self._separator.startswith("{") else ""
        self._file.write(f'{head}\n],"otherData":{json.dumps(facts)}}}\n')

    def _name(self, what: str, process: int, thread: int, name: str, order: int) -> None:
        self._event("M", process, thread, 0, name=f"{what}_name", args={"name": name})
        self._event("M", process, thread, 0, name=f"{what}_sort_index", args={"sort_index": order})

    def _event(self, phase: str, process: int, thread: int, at_us: int, **fields: Any) -> None:
        event = {"ph": phase, "pid": process, "tid": thread, "ts": at_us, **fields}
        self._file.write(self._separator + json.dumps(event, separators=(",", ":")))
        self._separator = ",\n"
