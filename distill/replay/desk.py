"""A producer's side of the exchange with the replay: what it holds, what it has finished, what is new.

The loops of :mod:`distill.algorithm` iterate over it. It makes every call repeatable: work that arrives twice is
started once, and a sample that was refused is given up.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from distill.interfaces import Exchange, Holder, Replay, ReplayUnavailable, SampleRef, Work
from distill.machine.clock import BusyClock

_REMEMBERED = 4096
"""Finished work whose ids are kept, to recognise an answer that crossed a delivery on its way."""


class Settles(Protocol):
    """The part of a store that the desk needs."""

    def settle(self, samples: Sequence[SampleRef]) -> None: ...


class Desk:
    """The work of one holder.

    ``async for work in desk`` yields lists of new work until the run is over; :meth:`deliver` hands in what is
    finished. Several tasks may deliver, and one iterates.
    """

    def __init__(
        self,
        replay: Replay,
        holder: Holder,
        store: Settles,
        *,
        capacity: int,
        samples_per_draw: int = 1,
        clock: BusyClock | None = None,
        retry_s: float = 0.5,
    ) -> None:
        """``capacity``: pieces of work at a time. ``samples_per_draw``: after how many samples a draw is finished.
        ``clock``: it learns when the holder has work. ``retry_s``: pause before a call that was not answered is
        repeated."""
        self._replay = replay
        self._holder = holder
        self._store = store
        self._capacity = capacity
        self._samples_per_draw = samples_per_draw
        self._retry_s = retry_s
        self._held: dict[str, int] = {}
        """``work_id`` -> samples to deliver."""
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._done: list[SampleRef] = []
        self._calls: dict[asyncio.Future[Exchange], list[SampleRef]] = {}
        """Calls that are not answered, oldest first, with what they deliver. All but the newest are about to be."""
        self._delivered = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._over = False
        self._retiring = self._has_told = False
        self._clock = clock or BusyClock()
        self._clock.hold(False)

    def retire(self) -> None:
        """Take no more work. The iteration ends when what is held is delivered."""
        self._retiring = True
        self._delivered.set()

    def deliver(self, samples: Sequence[SampleRef]) -> None:
        """Hand in finished samples. They are in the store."""
        for sample in samples:
            work_id = sample.work_id if sample.work_id in self._held else sample.draw.work_id
            self._held[work_id] -= 1
            if self._held[work_id] == 0:
                del self._held[work_id]
                self._finished[work_id] = None
        while len(self._finished) > _REMEMBERED:
            self._finished.popitem(last=False)
        self._note_held()
        self._done += samples
        self._delivered.set()

    async def idle(self) -> None:
        """Wait until nothing is held."""
        await self._idle.wait()

    def _note_held(self) -> None:
        self._clock.hold(bool(self._held))
        if self._held:
            self._idle.clear()
        else:
            self._idle.set()

    async def __aiter__(self) -> AsyncIterator[list[Work]]:
        try:
            while not self._is_finished:
                if new := await self._exchange():
                    yield new
        finally:
            self._clock.stop()
            for call in self._calls:
                call.cancel()

    @property
    def _is_finished(self) -> bool:
        """Whether everything is delivered, and no answer with new work can come."""
        if self._held or self._done:
            return False
        return self._over or (self._retiring and self._has_told and not self._calls)

    async def _exchange(self) -> list[Work]:
        """Call the replay if there is something to tell or to ask; returns the new work of answers that arrived."""
        room = 0 if self._over or self._retiring else self._capacity - len(self._held)
        # A call without room ends the one that waits for work.
        must_tell = self._retiring and not self._has_told and not self._over
        if self._done or must_tell or (room > 0 and not self._calls):
            self._has_told = self._retiring
            done, self._done = self._done, []
            call = self._replay.exchange(self._holder, done, list(self._held), room)
            self._calls[asyncio.ensure_future(call)] = done
        self._delivered.clear()
        delivered = asyncio.ensure_future(self._delivered.wait())
        try:
            await asyncio.wait([*self._calls, delivered], return_when=asyncio.FIRST_COMPLETED)
        finally:
            delivered.cancel()
        new: list[Work] = []
        for call in [call for call in self._calls if call.done()]:
            samples = self._calls.pop(call)
            try:
                new += self._take_in(call.result(), samples)
            except ReplayUnavailable:
                self._done = samples + self._done
                await asyncio.sleep(self._retry_s)
        return new

    def _take_in(self, answer: Exchange, samples: Sequence[SampleRef]) -> list[Work]:
        self._over |= answer.over
        self._store.settle(samples)
        known = (self._held, self._finished)
        new = [work for work in answer.work if not any(work.work_id in ids for ids in known)]
        for work in new:
            self._held[work.work_id] = 1 if isinstance(work, SampleRef) else self._samples_per_draw
        self._note_held()
        return new
