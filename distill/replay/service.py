"""The replay index behind long polls: every call waits until it has a result.

The three loops call it directly in one process, or through the Ray actor that forwards to it.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from distill.interfaces import Draw, GroupRef, Lease, ScoringJob
from distill.replay.index import ReplayIndex
from distill.replay.ledger import Stage

Answer = TypeVar("Answer", list[Draw], ScoringJob, Lease | None)

WAITS = {
    "rollout": "timing/rollout_blocked_s",  # by the rate limiter
    "teacher": "timing/teacher_starved_s",  # of groups and teacher draws
    "learner": "timing/learner_starved_s",  # of scored groups
}
"""Metric of the seconds that each kind of caller has waited, summed over its actors."""


class ReplayService:
    """Implements :class:`distill.interfaces.Replay`. An empty result means that the run is over."""

    def __init__(self, index: ReplayIndex) -> None:
        self.index = index
        self._changed = asyncio.Condition()
        self._stopped = False
        self._waited_s: defaultdict[str, float] = defaultdict(float)
        self._waiting_since: dict[object, tuple[str, float]] = {}

    # Rollout actors

    async def admit(self, max_draws: int) -> list[Draw]:
        return await self._wait_for("rollout", lambda: self.index.admit(max_draws), [])

    async def insert(self, groups: Sequence[GroupRef]) -> None:
        await self._change(lambda: self.index.insert(groups))

    # Teacher actors

    async def take_for_scoring(self, max_groups: int) -> ScoringJob:
        return await self._wait_for("teacher", lambda: self.index.take_for_scoring(max_groups), ScoringJob())

    async def insert_scored(self, groups: Sequence[GroupRef]) -> None:
        await self._change(lambda: self.index.insert_scored(groups))

    # Learner

    async def lease(self, update: int) -> Lease | None:
        if update >= self.index.num_updates:
            return None
        return await self._wait_for("learner", lambda: self.index.lease(update), None)

    async def acknowledge(self, update: int) -> None:
        await self._change(lambda: self.index.acknowledge(update))

    async def advance(self, updates_done: int, policy_version: int) -> None:
        await self._change(lambda: self.index.advance(updates_done, policy_version))

    async def set_student_share(self, share: float) -> None:
        await self._change(lambda: self.index.set_student_share(share))

    async def commit(self, updates_done: int) -> None:
        """Record that the checkpoint with these updates is durable."""
        await self._change(lambda: self.index.commit(updates_done))

    # Driver

    async def requeue(self, draw_ids: Iterable[str], stage: Stage | None = None) -> int:
        """Give back the draws of a dead actor; returns how many of them it still had."""
        return await self._change(lambda: self.index.requeue(draw_ids, stage))

    async def state(self) -> dict[str, Any]:
        return self.index.state()

    async def load_state(self, state: dict[str, Any]) -> None:
        await self._change(lambda: self.index.load_state(state))

    async def freed_segments(self, writer_prefix: str) -> dict[str, int]:
        return self.index.freed_segments(writer_prefix)

    async def stats(self) -> dict[str, float]:
        """Return the index's numbers and the seconds waited, including waits that are not over."""
        waited = self._waited_s.copy()
        for kind, since in self._waiting_since.values():
            waited[kind] += time.monotonic() - since
        return self.index.stats() | {name: waited[kind] for kind, name in WAITS.items()}

    async def stop(self) -> None:
        """End every present and later wait with an empty result."""
        self._stopped = True
        await self._change(lambda: None)

    # Waits

    async def _wait_for(self, kind: str, poll: Callable[[], Answer], nothing: Answer) -> Answer:
        """Return the first result of ``poll`` that is not empty, or ``nothing`` once the run is over.

        It polls before it checks ``finished``, so that a learner that went back to its checkpoint
        gets its last leases again.
        """
        call = object()
        self._waiting_since[call] = (kind, time.monotonic())
        try:
            async with self._changed:
                while not self._stopped:
                    if answer := poll():
                        self._changed.notify_all()
                        return answer
                    if self.index.finished:
                        break
                    await self._changed.wait()
                return nothing
        finally:
            _, since = self._waiting_since.pop(call)
            self._waited_s[kind] += time.monotonic() - since

    async def _change(self, change: Callable[[], Any]) -> Any:
        async with self._changed:
            result = change()
            self._changed.notify_all()
            return result
