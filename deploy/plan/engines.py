"""Engines, learner and pushes that only wait. The replay, the desks and the train loop around them are the real ones."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

from deploy.plan.load import Load, Outcome, Service
from deploy.run.training.clocks import StageClocks
from distill.algorithm import train_loop
from distill.interfaces import Holder, Lease, Location, Replay, SampleRef, WeightManifest, Work
from distill.machine.clock import BusyClock
from distill.replay.desk import Desk

_NEWEST = 1 << 60
_RESOLUTION_S = 1e-8
"""Ten times the shortest time that an event loop's timer can wait."""


class WaitingEngine:
    """Processes what it holds together: with n texts, a share of 1 / (fixed_s + each_s * n) of each per second."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._done = 0.0
        """How many texts one that had been there from the start would have finished."""
        self._since = 0.0
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        """A heap: the value of ``_done`` at which each is finished."""
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    async def serve(self) -> None:
        """Process one text."""
        loop = asyncio.get_running_loop()
        self._progress(loop.time())
        finished: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._running, (self._done + 1.0, next(self._order), finished))
        self._set_timer(loop)
        await finished

    def _progress(self, now: float) -> None:
        if self._running:
            self._done += (now - self._since) / self._service.seconds(len(self._running))
        self._since = now

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._running:
            self._timer = loop.call_later(max(0.0, self._left_s), self._finish)

    @property
    def _left_s(self) -> float:
        """Seconds until the next text is finished, if no other comes."""
        return (self._running[0][0] - self._done) * self._service.seconds(len(self._running))

    def _finish(self) -> None:
        loop = asyncio.get_running_loop()
        self._progress(loop.time())
        while self._running and self._left_s <= _RESOLUTION_S:
            _, _, finished = heapq.heappop(self._running)
            if not finished.done():
                finished.set_result(None)
        self._set_timer(loop)


class _NoStore:
    def settle(self, samples: Sequence[SampleRef]) -> None:
        pass


async def run_engine(replay: Replay, holder: Holder, load: Load, clock: BusyClock) -> None:
    """Work at a desk until the run is over. ``clock`` learns when the engine is busy."""
    config = load.config
    together = config.replay.lock_step
    samples_per_draw = config.rollout.samples_per_prompt if holder.kind == "rollout" else 1
    sequences = (config.rollout if holder.kind == "rollout" else config.scoring).max_num_seqs
    engine = WaitingEngine(load.rollout if holder.kind == "rollout" else load.teacher)
    desk = Desk(
        replay,
        holder,
        _NoStore(),
        capacity=1 if together else max(1, sequences // samples_per_draw),
        samples_per_draw=samples_per_draw,
        clock=clock,
    )

    async def process(texts: Sequence[tuple[Work, int]]) -> None:
        with clock.running():
            await asyncio.gather(*(engine.serve() for _ in texts))
        desk.deliver([_finished(work, sample, holder) for work, sample in texts])

    async with asyncio.TaskGroup() as running:
        async for new in desk:
            texts = [(work, sample) for work in new for sample in range(samples_per_draw)]
            for batch in [texts] if together else [[text] for text in texts]:
                running.create_task(process(batch))


def _finished(work: Work, sample: int, holder: Holder) -> SampleRef:
    # A version that the index does not know counts as the newest one.
    if isinstance(work, SampleRef):
        draw, sample, version = work.draw, work.sample, work.oldest_version
    else:
        draw, version = work, _NEWEST
    location = Location(
        node="n", segment=f"{holder}-0.arrow", offset=0, num_bytes=1, trajectory_id=f"{draw.draw_id}-{sample}"
    )
    return SampleRef(draw=draw, sample=sample, location=location, num_tokens=1, oldest_version=version)


class NoPushes:
    """Publisher and milestones of a run that has neither."""

    def __init__(self) -> None:
        self._version = 0

    async def write(self, updates_done: int) -> WeightManifest:
        self._version += 1
        return WeightManifest(
            policy_version=self._version, update=updates_done, path="", num_bytes=0, checksum=""
        )

    async def send(self, manifest: WeightManifest) -> None:
        pass

    async def before_training(self, updates_done: int, policy_version: int) -> None:
        pass

    def samples_after(self, updates_done: int) -> bool:
        return False

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        pass


Counters: TypeAlias = Callable[[], Awaitable[Mapping[str, float]]]


class _Waits(NoPushes):
    """Learner, publisher and milestones of a simulated run."""

    def __init__(self, load: Load, engines: Counters) -> None:
        super().__init__()
        self._now = now = asyncio.get_running_loop().time
        self._push_s = 0.0
        self._load = load
        self._engines = engines
        self._clock = BusyClock(now)
        self._shares = StageClocks(now)
        self._num_updates = load.config.learner.num_updates
        quarter = self._num_updates // 4
        self._full, self._last = max(1, quarter), self._num_updates - quarter
        """The updates between which the pipeline is full: it fills before and runs empty after them."""
        self._full_since = 0.0
        self._num_samples = 0
        self.outcome: Outcome | None = None

    async def update(self, lease: Lease) -> dict[str, float]:
        with self._clock.running():
            await asyncio.sleep(self._load.update.seconds(sum(len(group.samples) for group in lease.groups)))
        return {}

    async def send(self, manifest: WeightManifest) -> None:
        start = self._now()
        await asyncio.sleep(self._load.push_s)
        self._push_s = self._now() - start

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        if self._load.config.replay.lock_step and self._load.between_s:
            await asyncio.sleep(self._load.between_s)
        now = self._now()
        if self._full < updates_done <= self._last:
            student = [group for group in lease.groups if group.draw.table == "student_text"]
            self._num_samples += sum(len(group.samples) for group in student)
        if updates_done == self._full:
            self._full_since = now
            self._shares.shares(await self._counters())
        elif updates_done == self._last:
            counters = await self._counters()
            seconds = now - self._full_since
            self.outcome = Outcome(
                updates_per_s=(updates_done - self._full) / seconds,
                samples_per_s=self._num_samples / seconds,
                row=counters | self._shares.shares(counters),
            )

    async def _counters(self) -> dict[str, float]:
        own = {"timing/learner_total_busy_s": self._clock.busy_s, "timing/push_s": self._push_s}
        return {**await self._engines(), **own}


async def train(replay: Replay, load: Load, engines: Counters) -> Outcome:
    """Run the train loop to the last update. ``engines``: the counters of all engines, as an actor's stats name them.

    Raises: ValueError for a run of one update, which has no middle to measure.
    """
    if load.config.learner.num_updates < 2:
        raise ValueError("a simulated run has at least two updates")
    waits = _Waits(load, engines)
    await train_loop(
        replay,
        waits,
        waits,
        waits,
        updates_done=0,
        num_updates=load.config.learner.num_updates,
        lock_step=load.config.replay.lock_step,
    )
    assert waits.outcome is not None  # the last update is done
    return waits.outcome
