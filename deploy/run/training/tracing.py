"""The driver's part of a run's trace: its own spans, and the file that all spans go into.

The replay records where each piece of work is (:mod:`distill.replay.spans`). The wrappers here record what the loop of
:func:`distill.algorithm.train_loop` waits for, and each engine's loading of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deploy.run.training.fleet import Member
from distill.errors import first_line
from distill.interfaces import Exchange, Holder, Learner, Lease, Publisher, Replay, SampleRef, WeightManifest
from distill.machine.clock import epoch_ns
from distill.replay.spans import NONE, SpanBuffer, SpanKind, SpanOutcome
from distill.run.folder import RunFolder
from distill.run.span_file import SpanFile

COUNTERS = ("replay/student_text.", "replay/teacher_text.", "policy/age_")
"""How the names of the metrics begin that a trace shows."""


@dataclass
class OpenSpan:
    """A span that has not ended."""

    version: int
    """Of the weights, where it is known only at the end."""


class RunTrace:
    """Records the driver's spans, and writes those of all processes."""

    def __init__(
        self, folder: RunFolder, say: Callable[[str], None], clock: Callable[[], int] = epoch_ns
    ) -> None:
        """``say``: prints a line that stays. ``clock``: nanoseconds since 1970 that never go back."""
        self._say = say
        self._clock = clock
        self._buffer = SpanBuffer()
        self._file: SpanFile | None = None
        with self._guarded():
            self._file = SpanFile(folder.spans, folder.incarnation)

    @contextmanager
    def span(self, kind: SpanKind, lane: str, update: int, version: int = NONE) -> Iterator[OpenSpan]:
        """Record a ``with`` block, which is lost if it ends by an error. ``lane``: the actor that works."""
        open_span = OpenSpan(version)
        start, outcome = self._clock(), SpanOutcome.LOST
        try:
            yield open_span
            outcome = SpanOutcome.DONE
        finally:
            number, end = self._buffer.lane(lane), self._clock()
            version = open_span.version
            self._buffer.add((kind, number, 0, NONE, NONE, NONE, start, end, NONE, version, update, outcome))

    def write(self, of_replay: Mapping[str, Any]) -> None:
        """Write spans that the replay recorded, and the driver's so far."""
        drained = self._buffer.drain()
        with self._guarded():
            if self._file is not None:
                self._file.write(of_replay)
                self._file.write(drained)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """A medium that is full ends the trace, and not the run."""
        try:
            yield
        except OSError as error:
            self._file = None
            self._say(f"warning: the run records no trace any more ({first_line(error)})")

    def counters(self, update: int, row: Mapping[str, float]) -> None:
        """Write those metrics of an update that a trace shows."""
        shown = {name: value for name, value in row.items() if name.startswith(COUNTERS)}
        with self._guarded():
            if self._file is not None:
                self._file.counters(self._clock(), update, shown)

    def close(self) -> None:
        with self._guarded():
            if self._file is not None:
                self._file.write(self._buffer.drain())
                self._file.close()


class TracedReplay(Replay):
    """The replay of the train loop: its waits for groups are recorded."""

    def __init__(self, replay: Any, trace: RunTrace) -> None:
        self._replay = replay
        self._trace = trace

    async def lease(self, update: int) -> Lease | None:
        with self._trace.span(SpanKind.LEASE_WAIT, "learner", update + 1):
            return await self._replay.lease(update)

    async def exchange(
        self, holder: Holder, done: Sequence[SampleRef], holding: Sequence[str], room: int
    ) -> Exchange:
        return await self._replay.exchange(holder, done, holding, room)

    async def live_segments(self, names: Sequence[str]) -> list[str]:
        return await self._replay.live_segments(names)

    async def acknowledge(self, update: int) -> None:
        await self._replay.acknowledge(update)

    async def advance(self, updates_done: int, policy_version: int) -> None:
        await self._replay.advance(updates_done, policy_version)


class TracedLearner(Learner):
    """A learner whose updates are recorded."""

    def __init__(self, learner: Any, trace: RunTrace) -> None:
        self._learner = learner
        self._trace = trace

    async def update(self, lease: Lease) -> dict[str, float]:
        with self._trace.span(SpanKind.UPDATE, "learner", lease.update + 1):
            return await self._learner.update(lease)


class TracedPublisher(Publisher):
    """A publisher whose pushes are recorded, from the copy of the weights to the last engine."""

    def __init__(self, publisher: Publisher, trace: RunTrace) -> None:
        self._publisher = publisher
        self._trace = trace

    async def write(self, updates_done: int) -> WeightManifest:
        with self._trace.span(SpanKind.WRITE, "learner", updates_done) as open_span:
            manifest = await self._publisher.write(updates_done)
            open_span.version = manifest.policy_version
            return manifest

    async def send(self, manifest: WeightManifest) -> None:
        with self._trace.span(SpanKind.PUSH, "driver", manifest.update, manifest.policy_version):
            await self._publisher.send(manifest)


class TracedReceiver:
    """An engine whose loading of weights is recorded."""

    def __init__(self, member: Member, trace: RunTrace) -> None:
        self.member = member
        self._trace = trace

    async def update_weights(self, manifest: WeightManifest) -> None:
        lane, version = str(self.member.holder), manifest.policy_version
        with self._trace.span(SpanKind.LOAD, lane, manifest.update, version):
            await self.member.actor.update_weights(manifest)
