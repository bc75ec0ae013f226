"""Run folders with spans, and what every trace must satisfy."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from distill.replay.service import ReplayService
from distill.replay.spans import NONE, SpanBuffer, SpanKind, SpanOutcome, WorkSpans
from distill.run.folder import RunFolder
from distill.run.span_file import SpanFile
from tests.unit.deploy.run_folders import run_folder
from tests.unit.replay.builders import Settings
from tests.unit.replay.test_races import Run
from tests.unit.replay.test_spans import rows

START_NS = 1_790_000_000_000_000_000


class UnevenClock:
    """Stands still now and then, as a clock does between events of one microsecond."""

    def __init__(self, seed: int, start_ns: int) -> None:
        self._luck = random.Random(seed)
        self._now = start_ns

    def __call__(self) -> int:
        self._now += self._luck.choice([0, 300, 1000, 40_000, 5_000_000])
        return self._now


def traced_run(path: Path, *, num_starts: int = 1, deaths: int = 2) -> RunFolder:
    """A run whose spans come from the real replay, with actors that die. Each start makes all updates anew."""
    folder = run_folder(path)
    for incarnation in range(1, num_starts + 1):
        file = SpanFile(folder.spans, incarnation)
        spans = asyncio.run(spans_of_a_run(incarnation, deaths))
        file.write(spans)
        file.write(driver_spans(rows(spans)))
        counters = {
            "replay/student_text.drawn": 3.0,
            "replay/student_text.scored": 2.0,
            "policy/age_max": 1.0,
        }
        file.counters(START_NS + incarnation * 10**12, 1, counters)
        file.close()
    return folder


async def spans_of_a_run(seed: int, deaths: int) -> dict[str, Any]:
    chosen = Settings(
        num_updates=5, prompts_per_update=3, samples_per_prompt=2, num_rollouts=2, num_scorers=2
    )
    run = Run(chosen, seed, faults=0.1, deaths=deaths)
    clock = UnevenClock(seed, START_NS + seed * 10**12)
    run.service = run.wire.service = ReplayService(
        run.service.index, WorkSpans(chosen.samples_per_prompt, clock)
    )
    try:
        await run.main()
    finally:
        for task in run.actors.values():
            task.cancel()
    return await run.service.spans()


def driver_spans(of_replay: list[dict[str, Any]]) -> dict[str, Any]:
    """An update within each lease, and a push after it."""
    buffer = SpanBuffer()
    for lease in (row for row in of_replay if row["kind"] is SpanKind.LEASE):
        start, end, update = lease["start_ns"], lease["end_ns"], lease["update"]
        for kind, lane, version, began, ended in (
            (SpanKind.UPDATE, "learner", NONE, start, end),
            (SpanKind.WRITE, "learner", update + 1, end, end + 2000),
            (SpanKind.LOAD, "rollout-0.1000", update + 1, end + 2000, end + 900_000),
            (SpanKind.PUSH, "driver", update + 1, end + 2000, end + 1_000_000),
        ):
            lost = lease["outcome"] if kind is SpanKind.UPDATE else SpanOutcome.DONE
            buffer.add(
                (kind, buffer.lane(lane), 0, NONE, NONE, NONE, began, ended, NONE, version, update, lost)
            )
    return buffer.drain()


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def slices(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def assert_valid(trace: dict[str, Any]) -> None:
    """The rules of Chrome's format that a viewer needs: named lanes without overlaps, arrows between slices."""
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for each in slices(trace):
        assert type(each["ts"]) is int and type(each["dur"]) is int and each["dur"] >= 0
        lanes[each["pid"], each["tid"]].append((each["ts"], each["ts"] + each["dur"]))
    for spans in lanes.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    named = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    threads = {(event["pid"], event["tid"]) for event in named if event["name"] == "thread_name"}
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    assert set(lanes) == threads
    assert {process for process, _ in lanes} <= set(processes)
    assert len(set(processes.values())) == len(processes)
    arrows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] in "stf":
            arrows[event["id"]].append(event)
            spans = lanes[event["pid"], event["tid"]]
            assert any(start <= event["ts"] < max(end, start + 1) for start, end in spans)
    for events in arrows.values():
        events.sort(key=lambda event: event["ts"])
        phases = "".join(event["ph"] for event in events)
        assert phases in ("sf", "stf", "st"), phases
        assert len({event["name"] for event in events}) == 1
