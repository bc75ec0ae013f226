"""Whole runs through the service, on a wire that loses, delays and repeats messages, with actors that die.

Everything happens on one event loop without real time, so a seed repeats a failure.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest

from distill.interfaces import Draw, Exchange, Holder, Lease, Location, ReplayUnavailable, SampleRef, Work
from distill.replay.desk import Desk
from distill.replay.service import ReplayService
from tests.unit.replay.builders import Settings, draw_numbers

ROWS_PER_SEGMENT = 3
RUNS = 10_000
LIMIT = 20_000
"""Turns of the event loop after which a run counts as stuck."""


class Wire:
    """The replay as an actor reaches it."""

    def __init__(self, service: ReplayService, luck: random.Random, faults: float) -> None:
        self.service = service
        self.luck = luck
        self.faults = faults

    async def exchange(
        self, holder: Holder, done: Sequence[SampleRef], holding: Sequence[str], room: int
    ) -> Exchange:
        await self.delay()
        if self.luck.random() < self.faults:
            raise ReplayUnavailable("request", "lost", "arrive")
        call = self.service.exchange(holder, list(done), list(holding), room)
        if self.luck.random() < self.faults:
            # The call arrives twice; the second answer is the one that gets through.
            first = asyncio.ensure_future(call)
            await asyncio.sleep(0)
            call = self.service.exchange(holder, list(done), list(holding), room)
            answer = await call
            first.cancel()
        else:
            answer = await call
        await self.delay()
        if self.luck.random() < self.faults:
            raise ReplayUnavailable("answer", "lost", "arrive")
        return answer

    async def live_segments(self, names: Sequence[str]) -> list[str]:
        return await self.service.live_segments(names)

    async def delay(self) -> None:
        for _ in range(self.luck.randint(0, 3)):
            await asyncio.sleep(0)


class Shelf:
    """A store without bytes. It knows which segments were deleted."""

    def __init__(self, holder: Holder, deleted: set[str]) -> None:
        self.holder = holder
        self.deleted = deleted
        self.count = 0
        self.unsettled: Counter[str] = Counter()

    def append(self, draw: Draw, sample: int, version: int | None) -> SampleRef:
        segment = f"{self.holder}-{self.count // ROWS_PER_SEGMENT}.arrow"
        location = Location(node="n", segment=segment, offset=self.count, num_bytes=7, trajectory_id="t")
        self.count += 1
        self.unsettled[segment] += 1
        return SampleRef(draw=draw, sample=sample, location=location, num_tokens=3, oldest_version=version)

    def settle(self, samples: Sequence[SampleRef]) -> None:
        for sample in samples:
            self.unsettled[sample.location.segment] -= 1
            assert self.unsettled[sample.location.segment] >= 0, "a row was settled twice"

    def settled_segments(self) -> list[str]:
        full = self.count // ROWS_PER_SEGMENT
        names = [f"{self.holder}-{number}.arrow" for number in range(full)]
        return [name for name in names if self.unsettled[name] == 0 and name not in self.deleted]

    def delete(self, names: Collection[str]) -> None:
        self.deleted |= set(names)


class Run:
    """Actors, a learner, and a supervisor that declares actors dead."""

    def __init__(self, settings: Settings, seed: int, *, faults: float, deaths: int) -> None:
        self.settings = settings
        self.luck = random.Random(seed)
        self.service = ReplayService(settings.index())
        self.wire = Wire(self.service, self.luck, faults)
        self.deaths = deaths
        self.version = 0
        self.actors: dict[Holder, asyncio.Task[None]] = {}
        self.deleted: set[str] = set()
        self.leases: list[Lease] = []

    async def main(self) -> None:
        for number in range(self.settings.num_rollouts):
            self.start(Holder("rollout", number))
        for number in range(self.settings.num_scorers):
            self.start(Holder("teacher", number))
        learner = asyncio.ensure_future(self.train())
        killer = asyncio.ensure_future(self.kill())
        for _ in range(LIMIT):
            await asyncio.sleep(0)
            for task in [learner, killer, *self.actors.values()]:
                if task.done() and not task.cancelled():
                    task.result()
            if learner.done():
                break
        assert learner.done(), f"stuck: {self.service.index.stats()}"
        killer.cancel()
        for _ in range(LIMIT):
            if all(task.done() for task in self.actors.values()):
                break
            await asyncio.sleep(0)
        for task in self.actors.values():
            await task  # every loop ends by itself when the run is over

    def start(self, holder: Holder) -> None:
        self.actors[holder] = asyncio.ensure_future(self.act(holder))

    async def act(self, holder: Holder) -> None:
        store = Shelf(holder, self.deleted)
        lock_step = self.settings.max_policy_age == 0
        desk = Desk(
            self.wire,
            holder,
            store,
            capacity=1 if lock_step else self.luck.randint(1, 4),
            samples_per_draw=self.settings.samples_per_prompt if holder.kind == "rollout" else 1,
            retry_s=0,
        )
        async with asyncio.TaskGroup() as tasks:
            async for work in desk:
                for each in work:
                    for part in self.parts(each):
                        tasks.create_task(self.do(desk, store, *part))
                names = store.settled_segments()
                store.delete(set(names) - set(await self.wire.live_segments(names)))

    def parts(self, work: Work) -> list[tuple[Draw, int, int | None]]:
        if isinstance(work, SampleRef):
            assert work.location.segment not in self.deleted
            return [(work.draw, work.sample, work.oldest_version)]
        if work.table == "teacher_text":
            return [(work, 0, None)]
        return [(work, sample, self.version) for sample in range(self.settings.samples_per_prompt)]

    async def do(self, desk: Desk, store: Shelf, draw: Draw, sample: int, version: int | None) -> None:
        for _ in range(self.luck.randint(0, 6)):
            await asyncio.sleep(0)
        desk.deliver([store.append(draw, sample, version)])

    async def train(self) -> None:
        """Train to the end; now and then the learner dies and goes back to the newest checkpoint."""
        update = committed = 0
        restarts = self.deaths
        await self.push(0)
        while update < self.settings.num_updates:
            lease = await self.service.lease(update)
            assert lease is not None
            segments = {each.location.segment for group in lease.groups for each in group.samples}
            assert not segments & self.deleted
            await self.wire.delay()
            if restarts and self.luck.random() < 0.2:
                restarts -= 1
                update = committed
                del self.leases[update:]
            else:
                self.leases.append(lease)
                await self.service.acknowledge(update)
                update += 1
                if self.luck.random() < 0.5:
                    await self.service.commit(update)
                    committed = update
            await self.push(update)

    async def push(self, updates_done: int) -> None:
        self.version += 1
        await self.wire.delay()
        await self.service.advance(updates_done, self.version)

    async def kill(self) -> None:
        for _ in range(self.deaths):
            for _ in range(self.luck.randint(1, 40)):
                await asyncio.sleep(0)
            holder = self.luck.choice(list(self.actors))
            if self.luck.random() < 0.7:
                task = self.actors.pop(holder)
                task.cancel()
            else:
                task = self.actors.pop(holder)  # it was only slow: it goes on, and notices that it is dead
            await self.wire.delay()
            await self.service.forget(holder)
            self.start(replace(holder, incarnation=holder.incarnation + 1))


def check(run: Run) -> None:
    settings, plan = run.settings, run.settings.plan
    used = [number for lease in run.leases for number in draw_numbers(lease.groups)]
    if settings.max_times_sampled == 1:
        assert used == list(range(plan.student_through(settings.num_updates))), "skipped or used twice"
    assert max(Counter(used).values(), default=0) <= settings.max_times_sampled
    for lease in run.leases:
        assert all(age <= settings.max_policy_age for age in lease.policy_ages)
        rows = draw_numbers(lease.groups, "teacher_text")
        assert rows == list(range(plan.teacher_through(lease.update), plan.teacher_through(lease.update + 1)))


def settings_of(luck: random.Random) -> Settings:
    age = luck.choice([0, 1, 1, 2])
    times = 1 if age == 0 else luck.choice([1, 1, 2])
    student, teacher = luck.choice(
        [("every_update", "sampled"), ("every_update", "none"), ("none", "sampled")]
    )
    return Settings(
        num_updates=luck.randint(1, 4),
        prompts_per_update=luck.randint(1, 3),
        samples_per_prompt=luck.randint(1, 2),
        teacher_rows_per_update=luck.randint(1, 2),
        student_text=student,
        teacher_text=teacher,
        max_policy_age=age,
        max_times_sampled=times,
        max_bytes=luck.choice([1, 1 << 40]),
        num_rollouts=luck.randint(1, 3),
        num_scorers=luck.randint(1, 3),
        seed=luck.randint(0, 9),
    )


async def one_run(seed: int, *, faults: float, deaths: int) -> None:
    run = Run(settings_of(random.Random(seed)), seed, faults=faults, deaths=deaths)
    try:
        await run.main()
        check(run)
    except BaseException as error:
        error.add_note(f"seed {seed}, faults {faults}, deaths {deaths}: {run.settings}")
        raise
    finally:
        for task in run.actors.values():
            task.cancel()


@pytest.mark.parametrize("part", range(4))
async def test_no_interleaving_loses_doubles_or_blocks_anything(part: int) -> None:
    for seed in range(part, RUNS, 4):
        await one_run(seed, faults=0.1 * (seed % 3), deaths=seed % 4)
