"""The replay index behind long polls: a call waits until it has a result.

The loops call it directly in one process, or through the Ray actor that forwards to it. All methods run on
one event loop, and none awaits between a change of the index and the answers that follow from it.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.errors import NO_VALUE
from distill.interfaces import Exchange, Holder, Kind, Lease, ReplayUnavailable, SampleRef, Work
from distill.replay.index import ReplayIndex
from distill.replay.past import IndexPast
from distill.replay.spans import WorkSpans

KINDS: tuple[Kind, ...] = ("rollout", "scoring")
_SPARE = 64
"""Entries beyond twice the polls at which a queue is cleared of those that no longer wait."""


@dataclass(eq=False)
class _Poll:
    """An exchange that waits for work."""

    holder: Holder
    room: int
    answer: asyncio.Future[Exchange]
    work: list[Work] = field(default_factory=list)


class ReplayService:
    """Implements :class:`distill.interfaces.Replay`."""

    def __init__(self, index: ReplayIndex, spans: WorkSpans | None = None, *, is_open: bool = True) -> None:
        """``spans``: where the transitions of work are recorded, for tests. ``is_open``: False until :meth:`take_over`
        is called; actors have to repeat their calls meanwhile."""
        self.index = index
        self._is_open = is_open
        self._spans = spans or WorkSpans(index.samples_per_prompt)
        self._stopped = False
        self._polls: dict[Holder, _Poll] = {}
        self._queues: dict[Kind, list[tuple[int, int, _Poll]]] = {kind: [] for kind in KINDS}
        """Heaps of polls, the one with the most room first; some are no longer waiting."""
        self._order = itertools.count()
        self._leases: dict[asyncio.Future[Lease | None], tuple[int, float]] = {}
        """The learner's waits: the update that each asks for, and since when."""
        self._learner_waited_s = 0.0
        self._moved: dict[Holder, float] = {}
        """When each actor delivered last, or got work while it had none."""

    # Rollout and teacher actors

    async def exchange(
        self, holder: Holder, done: Sequence[SampleRef], holding: Sequence[str], room: int
    ) -> Exchange:
        """See :meth:`distill.interfaces.Replay.exchange`.

        An answer that an actor missed is given again, because its work is missing from ``holding``.

        Raises: ReplayUnavailable before :meth:`take_over`.
        """
        self._require_open()
        if self.index.holdings.is_dead(holder):
            return Exchange(refused=tuple(sample.work_id for sample in done), over=True)
        self._answer(self._polls.pop(holder, None))
        if done or not self.index.holdings.num_held(holder):
            self._moved[holder] = time.monotonic()
        refused = tuple(self.index.deliver(holder, done))
        self._spans.delivered(holder, done, refused)
        lost = self.index.holdings.missing(holder, holding)
        poll = _Poll(
            holder,
            max(0, room - len(lost)),
            asyncio.get_running_loop().create_future(),
            lost,
        )
        self._enqueue(poll)
        self._settle()
        if refused or lost or room <= 0:
            self._answer(self._polls.pop(holder, None))
        try:
            answer = await poll.answer
        finally:
            # A caller that gave up must not be served. Its work, if it got some, is missing from its next call.
            if self._polls.get(holder) is poll:
                del self._polls[holder]
        return Exchange(work=answer.work, refused=refused, over=answer.over) if refused else answer

    async def forget(self, holder: Holder) -> int:
        """Declare an actor dead: end its waits, refuse what it may still send, give its work to others.

        Returns how many pieces of work it held.
        """
        self._require_open()
        num_held = self.index.forget(holder)
        self._spans.forgotten(holder)
        self._answer(self._polls.pop(holder, None), over=True)
        self._settle()
        return num_held

    async def live_segments(self, names: Sequence[str]) -> list[str]:
        self._require_open()  # an index that knows no rows yet would have them deleted
        return self.index.live_segments(names)

    # Learner

    async def lease(self, update: int) -> Lease | None:
        """See :meth:`distill.interfaces.Replay.lease`. Raises: ReplayError for an update out of order."""
        self._require_open()
        if update >= self.index.num_updates or self._stopped:
            return None
        lease = self._lease(update)
        if lease is not None:
            self._settle()
            return lease
        if self.index.finished:
            return None
        wait: asyncio.Future[Lease | None] = asyncio.get_running_loop().create_future()
        self._leases[wait] = (update, time.monotonic())
        self._settle()  # stale groups can have been given back
        try:
            return await wait
        finally:
            if wait in self._leases:
                self._end_lease(wait)

    async def acknowledge(self, update: int) -> None:
        self._require_open()
        self.index.acknowledge(update)
        self._spans.acknowledged(update)
        self._settle()

    async def advance(self, updates_done: int, policy_version: int) -> None:
        self._require_open()
        self.index.advance(updates_done, policy_version)
        self._settle()

    async def set_student_share(self, share: float) -> list[tuple[int, float]]:
        """See :meth:`distill.replay.index.ReplayIndex.set_student_share`."""
        self._require_open()
        shares = self.index.set_student_share(share)
        self._settle()
        return shares

    async def commit(self, updates_done: int) -> None:
        """Record that the checkpoint with these updates is durable."""
        self._require_open()
        self.index.commit(updates_done)
        self._settle()

    # Driver

    async def state(self) -> dict[str, Any]:
        self._require_open()
        return self.index.state()

    async def take_over(self, past: IndexPast) -> None:
        """Continue what the run has done; see :meth:`distill.replay.index.ReplayIndex.take_over`."""
        self.index.take_over(past)
        self._is_open = True
        self._settle()

    async def go_back(self, state: dict[str, Any] | None) -> bool:
        """Go back with the learner; see :meth:`distill.replay.index.ReplayIndex.go_back`."""
        self._require_open()
        if forgotten := self.index.go_back(state):
            self._spans.restarted()
        self._settle()
        return forgotten

    async def stats(self) -> dict[str, float]:
        """Return the index's numbers, and the seconds that the learner has waited, the present ones included."""
        self._require_open()
        now = time.monotonic()
        waited_s = self._learner_waited_s + sum(now - since for _, since in self._leases.values())
        return self.index.stats() | {"timing/learner_starved_s": waited_s}

    async def spans(self) -> dict[str, Any]:
        """Return the spans that ended since the last call; see :meth:`distill.replay.spans.SpanBuffer.drain`."""
        self._require_open()
        return self._spans.drain()

    async def stalled(self, timeout_s: float) -> dict[Holder, float]:
        """Return the actors that have held work for so long without delivering any, with the seconds."""
        self._require_open()
        now = time.monotonic()
        silent = {holder: now - self._moved[holder] for holder in self.index.holdings.holders()}
        return {holder: seconds for holder, seconds in silent.items() if seconds > timeout_s}

    async def stop(self) -> None:
        """End every present and later wait with an empty result."""
        self._stopped = True
        self._settle()

    def _require_open(self) -> None:
        if not self._is_open:
            raise ReplayUnavailable("replay", NO_VALUE, "know what the run has done so far", "call again")

    # Waits

    def _settle(self) -> None:
        """Answer everyone whom the last change concerns.

        Leases come first: one can give stale groups back, which rollout actors then wait for.
        """
        for wait, (update, _) in list(self._leases.items()):
            self._try_lease(wait, update)
        if self._stopped or self.index.finished:
            for holder in list(self._polls):
                self._answer(self._polls.pop(holder), over=True)
            return
        for kind in KINDS:
            if self.index.has_work(kind):
                self._dispatch(kind)

    def _lease(self, update: int) -> Lease | None:
        lease = self.index.lease(update)
        if lease is not None:
            self._spans.leased(lease)
        return lease

    def _try_lease(self, wait: asyncio.Future[Lease | None], update: int) -> None:
        try:
            lease = None if self._stopped else self._lease(update)
        except Exception as error:
            self._end_lease(wait)
            wait.set_exception(error)
            return
        if lease is not None or self._stopped or self.index.finished:
            self._end_lease(wait)
            wait.set_result(lease)

    def _dispatch(self, kind: Kind) -> None:
        """Give work to the actors that wait, one piece at a time to the one with the most room."""
        queue = self._queues[kind]
        served: list[_Poll] = []
        left: list[tuple[int, int, _Poll]] = []
        while queue and self.index.has_work(kind):
            entry = heapq.heappop(queue)
            poll = entry[-1]
            if poll.answer.done() or self._polls.get(poll.holder) is not poll:
                continue  # answered, cancelled, or replaced by a newer call
            if not self.index.holdings.num_held(poll.holder):
                self._moved[poll.holder] = time.monotonic()
            work = self.index.take(poll.holder, 1)
            if not work:
                left.append(entry)  # in lock-step, what waits is another actor's share
                continue
            self._spans.given(poll.holder, work)
            if not poll.work:
                served.append(poll)
            poll.work += work
            poll.room -= len(work)
            if poll.room > 0:
                heapq.heappush(queue, (-poll.room, next(self._order), poll))
        for entry in left:
            heapq.heappush(queue, entry)
        for poll in served:
            self._answer(self._polls.pop(poll.holder))

    def _enqueue(self, poll: _Poll) -> None:
        """Let a poll take part in :meth:`_dispatch`."""
        self._polls[poll.holder] = poll
        queue = self._queues[poll.holder.kind]
        if len(queue) > 2 * len(self._polls) + _SPARE:
            queue[:] = [entry for entry in queue if self._polls.get(entry[-1].holder) is entry[-1]]
            heapq.heapify(queue)
        if poll.room > 0:
            heapq.heappush(queue, (-poll.room, next(self._order), poll))

    def _answer(self, poll: _Poll | None, *, over: bool = False) -> None:
        if poll is not None and not poll.answer.done():
            poll.answer.set_result(Exchange(work=tuple(poll.work), over=over))

    def _end_lease(self, wait: asyncio.Future[Lease | None]) -> None:
        _, since = self._leases.pop(wait)
        self._learner_waited_s += time.monotonic() - since
