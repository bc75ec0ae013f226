"""Spans: which piece of work was where, from when to when. `distill trace` shows them.

The replay service sees each transition of each piece of work with one clock, so it records them in
:class:`WorkSpans`: a draw with a rollout actor, a sample with a teacher actor, a group that waits for its update, a
lease. The driver records its own spans in a :class:`SpanBuffer`, fetches those of the replay once per update, and
writes both in the run folder (:mod:`distill.run.span_file`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeAlias

from distill.interfaces import Holder, Lease, SampleRef, Table, Work
from distill.machine.clock import epoch_ns

CAPACITY = 1 << 17
"""Spans that a buffer keeps until the driver fetches them; later ones are dropped and counted. At 96 bytes per span
they take 12 MiB. A trajectory has two spans, so this is enough for updates of 60,000 trajectories."""
NONE = -1
"""Stands for a number that a span does not have."""
FIELDS = (
    "kind", "lane", "table", "draw", "issue", "sample", "start_ns", "end_ns", "tokens", "version", "update", "outcome",
)  # fmt: skip
"""The integers of a span. ``lane``: place of its actor in the names of the buffer. ``table``: place in :data:`TABLES`.
``sample``: number of the sample, and the number of samples in a READY span. ``tokens``: response tokens.
``version``: the oldest policy version in the text, or the version of a push. ``update``: the updates done when this
update is, so the first one has 1, as in metrics.parquet."""
TABLES: tuple[Table, ...] = ("student_text", "teacher_text")

_PACKED = struct.Struct(f"{len(FIELDS)}q")

Row: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int, int]
"""One span: the values of :data:`FIELDS`. Times are nanoseconds since 1970."""


class SpanKind(IntEnum):
    """What a span is of. The numbers are in files, so they never change their meaning."""

    ROLLOUT = 0
    """A sample of a draw, from the time when a rollout actor got the draw until the sample was delivered."""
    SCORING = 1
    """A sample or a row of teacher text with a teacher actor."""
    READY = 2
    """A group, from its last score until its lease."""
    LEASE = 3
    """The groups of an update, until the update is acknowledged."""
    LEASE_WAIT = 4
    """The learner waits for the groups of an update."""
    UPDATE = 5
    WRITE = 6
    """The learner writes its weights for a push."""
    PUSH = 7
    """The way of the written weights to all engines, with the wait for weights that are pinned."""
    LOAD = 8
    """One engine loads a push."""
    EVALUATION = 9
    CHECKPOINT = 10


class SpanOutcome(IntEnum):
    """How a span ended."""

    DONE = 0
    REFUSED = 1
    """What was delivered is in no group, because the group had been issued again meanwhile."""
    LOST = 2
    """The actor died, or the run went back to a checkpoint."""


_DONE, _REFUSED, _READY = int(SpanOutcome.DONE), int(SpanOutcome.REFUSED), int(SpanKind.READY)
_TABLE = {table: number for number, table in enumerate(TABLES)}


class SpanBuffer:
    """Finished spans until somebody fetches them: a bounded number, the oldest first."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._values = bytearray()
        self._limit = capacity * _PACKED.size
        self._lanes: dict[str, int] = {}
        self._num_dropped = 0

    def lane(self, name: str) -> int:
        """Return the number that stands for an actor's name in this buffer."""
        return self._lanes.setdefault(name, len(self._lanes))

    def add(self, row: Row) -> None:
        if len(self._values) < self._limit:
            self._values += _PACKED.pack(*row)
        else:
            self._num_dropped += 1

    def drain(self) -> dict[str, Any]:
        """Return and forget the spans so far, as values that every process can read.

        ``values``: the rows as int64 in the machine's byte order. ``lanes``: the names of all actors so far.
        ``num_dropped``: spans that the buffer had no room for since the last call.
        """
        values, self._values = self._values, bytearray()
        num_dropped, self._num_dropped = self._num_dropped, 0
        return {"values": bytes(values), "lanes": list(self._lanes), "num_dropped": num_dropped}


_Piece: TypeAlias = tuple[Table, int, int, int]
"""Table, draw, issue and sample: unique among all work that is ever handed out."""


@dataclass(eq=False)
class _Held:
    """The work of one actor, with the time when it got each piece."""

    lane: int
    since_ns: dict[_Piece, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Leased:
    """A lease that is not acknowledged."""

    since_ns: int
    num_groups: int
    num_tokens: int


class WorkSpans:
    """Records the transitions of work that the replay service reports.

    A piece of work that an actor got has exactly one span, whatever is delivered twice, late or never: the span ends
    when the piece leaves the table of what the actor holds. The table has an entry for each piece with an actor
    and for each live group, so it is bounded by what the replay admits.
    """

    def __init__(
        self, samples_per_draw: int, clock: Callable[[], int] = epoch_ns, capacity: int = CAPACITY
    ) -> None:
        """``samples_per_draw``: of student text. ``clock``: nanoseconds since 1970 that never go back."""
        self._samples_per_draw = samples_per_draw
        self._clock = clock
        self._buffer = SpanBuffer(capacity)
        self._lane = self._buffer.lane("replay")
        self._held: dict[Holder, _Held] = {}
        self._ready: dict[tuple[Table, int], int] = {}
        """When the last sample of a live draw was scored."""
        self._leases: dict[int, _Leased] = {}

    @property
    def num_open(self) -> int:
        """Pieces of work and leases whose spans have not ended."""
        return sum(len(held.since_ns) for held in self._held.values()) + len(self._leases)

    def drain(self) -> dict[str, Any]:
        """See :meth:`SpanBuffer.drain`."""
        return self._buffer.drain()

    def given(self, holder: Holder, work: Sequence[Work]) -> None:
        """An actor got new work."""
        held = self._held.get(holder)
        if held is None:
            held = self._held[holder] = _Held(self._buffer.lane(str(holder)))
        now = self._clock()
        since = held.since_ns
        for each in work:
            if isinstance(each, SampleRef):
                draw = each.draw
                since[draw.table, draw.number, draw.issue, each.sample] = now
            else:
                for sample in range(self._samples_per_draw if each.table == "student_text" else 1):
                    since[each.table, each.number, each.issue, sample] = now

    def delivered(self, holder: Holder, done: Sequence[SampleRef], refused: Sequence[str]) -> None:
        """An actor delivered samples. ``refused``: ``work_id`` of those that the index refused."""
        held = self._held.get(holder)
        if held is None or not done:
            return
        now, add, lane = self._clock(), self._buffer.add, held.lane
        scores = holder.kind == "scoring"
        kind = SpanKind.SCORING if scores else SpanKind.ROLLOUT
        for sample in done:
            draw, number = sample.draw, sample.sample
            since = held.since_ns.pop((draw.table, draw.number, draw.issue, number), None)
            if since is None:  # it was sent before
                continue
            is_refused = bool(refused) and sample.work_id in refused
            table, version = _TABLE[draw.table], sample.oldest_version
            add((
                kind, lane, table, draw.number, draw.issue, number, since, now, sample.num_tokens,
                NONE if version is None else version, NONE, _REFUSED if is_refused else _DONE,
            ))  # fmt: skip
            if scores and not is_refused:
                self._ready[draw.table, draw.number] = now

    def forgotten(self, holder: Holder) -> None:
        """An actor was declared dead; others get its work."""
        held = self._held.pop(holder, None)
        if held is None:
            return
        now = self._clock()
        kind = SpanKind.ROLLOUT if holder.kind == "rollout" else SpanKind.SCORING
        for (table, draw, issue, sample), since in held.since_ns.items():
            self._buffer.add((
                kind, held.lane, _TABLE[table], draw, issue, sample, since, now, NONE, NONE, NONE, SpanOutcome.LOST,
            ))  # fmt: skip

    def leased(self, lease: Lease) -> None:
        """The learner got the groups of an update, perhaps in an answer that it missed and asked for again."""
        now = self._clock()
        for update in [update for update in self._leases if update > lease.update]:
            self._end_lease(update, now, SpanOutcome.LOST)  # the learner went back to a checkpoint
        if lease.update in self._leases:
            return
        num_tokens = 0
        for group in lease.groups:
            draw, samples = group.draw, group.samples
            tokens, version = 0, None
            for sample in samples:
                tokens += sample.num_tokens
                other = sample.oldest_version
                version = other if version is None or other is None else min(version, other)
            since = self._ready.pop((draw.table, draw.number), now)
            self._buffer.add((
                _READY, self._lane, _TABLE[draw.table], draw.number, draw.issue, len(samples), since, now, tokens,
                NONE if version is None else version, lease.update + 1, _DONE,
            ))  # fmt: skip
            num_tokens += tokens
        self._leases[lease.update] = _Leased(now, len(lease.groups), num_tokens)

    def acknowledged(self, update: int) -> None:
        """An update was applied, or its acknowledgement was sent again."""
        if update in self._leases:
            self._end_lease(update, self._clock(), SpanOutcome.DONE)

    def restarted(self) -> None:
        """The index continues from a checkpoint and has forgotten who holds what."""
        for holder in list(self._held):
            self.forgotten(holder)
        now = self._clock()
        for update in list(self._leases):
            self._end_lease(update, now, SpanOutcome.LOST)
        self._ready.clear()

    def _end_lease(self, update: int, now: int, outcome: SpanOutcome) -> None:
        lease = self._leases.pop(update)
        self._buffer.add((
            SpanKind.LEASE, self._lane, 0, NONE, NONE, lease.num_groups, lease.since_ns, now, lease.num_tokens, NONE,
            update + 1, outcome,
        ))  # fmt: skip
