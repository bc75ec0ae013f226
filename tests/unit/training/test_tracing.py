"""The driver's spans: what the train loop waits for, and each engine's loading."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from deploy.run.training.fleet import Member
from deploy.run.training.tracing import RunTrace, TracedLearner, TracedPublisher, TracedReceiver, TracedReplay
from distill.files import LineFile, write_json
from distill.interfaces import Holder, Lease, WeightManifest, WeightPushError
from distill.replay.spans import SpanBuffer, SpanKind, SpanOutcome
from distill.run.folder import RunFolder
from distill.run.span_file import Counters, Span, SpanReader, Started

MANIFEST = WeightManifest(policy_version=7, update=4, path="", num_bytes=0, checksum="")
EMPTY = SpanBuffer().drain()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    identity = {"run_id": "0a1b2c3d", "incarnation": 2, "fingerprint": "f", "created_at": "2026-11-27"}
    write_json(tmp_path / "run.json", identity)
    return RunFolder(tmp_path)


class Ticks:
    now = 0

    def __call__(self) -> int:
        self.now += 1000
        return self.now


class Parts:
    """Replay, learner, publisher and engine in one. Each call takes a turn of the event loop."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.passed: list[Any] = []

    async def lease(self, update: int) -> Lease:
        await asyncio.sleep(0)
        return Lease(update=update, groups=(), policy_ages=())

    async def advance(self, updates_done: int, policy_version: int) -> None:
        self.passed.append((updates_done, policy_version))

    async def acknowledge(self, update: int) -> None:
        self.passed.append(update)

    async def update(self, lease: Lease) -> dict[str, float]:
        await asyncio.sleep(0)
        return {"policy/loss": float(lease.update)}

    async def write(self, updates_done: int) -> WeightManifest:
        await asyncio.sleep(0)
        return MANIFEST

    async def send(self, manifest: WeightManifest) -> None:
        if self.error is not None:
            raise self.error

    async def update_weights(self, manifest: WeightManifest) -> None:
        await asyncio.sleep(0)


def found(folder: RunFolder, kind: type) -> list[Any]:
    return [each for each in SpanReader(folder.spans) if isinstance(each, kind)]


async def test_what_the_loop_waits_for_is_in_the_run_folder(folder: RunFolder) -> None:
    trace, parts = RunTrace(folder, print, Ticks()), Parts()
    engine: Any = parts
    replay = TracedReplay(parts, trace)
    lease = await replay.lease(3)
    assert lease is not None
    assert await TracedLearner(parts, trace).update(lease) == {"policy/loss": 3.0}
    await replay.acknowledge(3)
    await replay.advance(4, 7)
    assert parts.passed == [3, (4, 7)], "other calls pass through"
    publisher: Any = parts
    manifest = await TracedPublisher(publisher, trace).write(4)
    await TracedPublisher(publisher, trace).send(manifest)
    await TracedReceiver(Member(Holder("rollout", 1, 2000), engine), trace).update_weights(manifest)
    with trace.span(SpanKind.EVALUATION, "driver", 4):
        pass
    trace.write(EMPTY)
    trace.counters(4, {"policy/age_max": 1.0, "replay/student_text.scored": 5.0, "policy/loss": 0.1})
    trace.close()
    assert found(folder, Started) == [Started(2)]
    assert [
        (span.kind.name, span.lane, span.update, span.version, span.start_us, span.end_us)
        for span in found(folder, Span)
    ] == [
        ("LEASE_WAIT", "learner", 4, -1, 1, 2),
        ("UPDATE", "learner", 4, -1, 3, 4),
        ("WRITE", "learner", 4, 7, 5, 6),
        ("PUSH", "driver", 4, 7, 7, 8),
        ("LOAD", "rollout-1.2000", 4, 7, 9, 10),
        ("EVALUATION", "driver", 4, -1, 11, 12),
    ]
    [counters] = found(folder, Counters)
    assert counters.values == {"policy/age_max": 1.0, "replay/student_text.scored": 5.0}


async def test_what_fails_has_a_span_that_says_so(folder: RunFolder) -> None:
    trace = RunTrace(folder, print, Ticks())
    broken: Any = Parts(WeightPushError("push", 7, "arrive"))
    with pytest.raises(WeightPushError):
        await TracedPublisher(broken, trace).send(MANIFEST)
    trace.close()
    [span] = found(folder, Span)
    assert (span.kind, span.outcome) == (SpanKind.PUSH, SpanOutcome.LOST)


def test_a_full_medium_ends_the_trace_with_one_warning(folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    trace = RunTrace(folder, said.append, Ticks())

    def full(self: object, line: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LineFile, "append", full)
    for update in (1, 2):
        with trace.span(SpanKind.UPDATE, "learner", update):
            pass
        trace.counters(update, {"policy/age_max": 1.0})
        trace.write(SpanBuffer().drain())
    trace.close()
    assert len(said) == 1 and "records no trace any more" in said[0] and "No space left" in said[0]
