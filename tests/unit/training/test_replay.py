"""The replay as the driver calls it: its process dies before, during and after any call, and nothing is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.cluster.failures import ActorGone
from deploy.run.training.replay import LastingReplay
from distill.interfaces import Draw, Holder, Lease, ReplayUnavailable, SampleRef, Work
from distill.replay.service import ReplayService
from tests.unit.replay.builders import Settings, draw_numbers, fill, sample, scored


class MortalReplay:
    """An actor with a real index, whose process dies at calls that a test chooses."""

    def __init__(self, chosen: Settings, deaths: dict[int, bool]) -> None:
        """``deaths``: numbers of calls, and whether the call takes effect before its answer is lost."""
        self.settings = chosen
        self.deaths = deaths
        self.num_calls = 0
        self.num_deaths = 0
        self.is_quick = False
        self.handle = self
        self.service: ReplayService | None = self.new()

    @property
    def opened(self) -> ReplayService:
        assert self.service is not None
        return self.service

    def new(self) -> ReplayService:
        return ReplayService(self.settings.index(), is_open=False)

    async def revive(self, error: Exception) -> None:
        assert isinstance(error, ActorGone | ReplayUnavailable)
        self.service = self.new()

    def __getattr__(self, method: str) -> Any:
        async def call(*args: object) -> Any:
            self.num_calls += 1
            takes_effect = self.deaths.get(self.num_calls)
            if self.service is None:
                raise ActorGone.died("replay", "it was dead")
            if takes_effect is not False:
                result = await getattr(self.service, method)(*args)
            if takes_effect is not None:
                self.num_deaths += 1
                # Ray starts the process again by itself, maybe before anyone calls it.
                self.service = self.new() if self.is_quick else None
                raise ActorGone.died("replay", "killed")
            return result

        return call

    async def within(self, seconds: float | None, method: str, *args: object, setting: str = "") -> Any:
        return await getattr(self, method)(*args)


class Run:
    """Actors and a learner that take turns. An actor's work is lost when the replay forgets it."""

    def __init__(self, chosen: Settings, deaths: dict[int, bool], backs: set[int]) -> None:
        self.settings = chosen
        self.mortal = MortalReplay(chosen, deaths)
        self.replay = LastingReplay(self.mortal, None, self.mortal.revive, deadline_s=1)  # pyright: ignore[reportArgumentType]
        self.backs = backs
        """Updates after which the learner goes back to its checkpoint."""
        self.version = 0
        self.uses: dict[int, Lease] = {}

    async def work(self) -> None:
        """Roll out and score whatever is admitted."""
        rollout, teacher = (
            Holder("rollout", 0, self.mortal.num_deaths),
            Holder("teacher", 0, self.mortal.num_deaths),
        )
        for holder in (rollout, teacher, teacher):
            service = self.mortal.service
            while service is not None and service.index.has_work(holder.kind):
                got: tuple[Work, ...] = (await service.exchange(holder, [], [], 64)).work
                if not got:
                    break
                done = [self.finished(holder, each) for each in got]
                assert (await service.exchange(holder, done, [], 0)).refused == ()

    def finished(self, holder: Holder, work: Work) -> SampleRef:
        if holder.role == "rollout":
            assert isinstance(work, Draw)
            return sample(work, self.version)
        return scored(work)

    async def push(self, updates: int) -> None:
        self.version += 1
        await self.replay.advance(updates, self.version)

    async def train(self) -> None:
        await self.replay.start()
        await self.push(0)
        checkpoint: dict[str, Any] | None = None
        updates = 0
        while updates < self.settings.num_updates:
            lease = None
            while lease is None:
                await self.work()
                try:
                    async with asyncio.timeout(0.05):
                        lease = await self.replay.lease(updates)
                except TimeoutError:  # the replay has died, and what was there is drawn again
                    continue
            self.check(updates, lease)
            await self.replay.acknowledge(updates)
            updates += 1
            await self.push(updates)
            if updates in self.backs:
                self.backs.remove(updates)
                await self.replay.go_back(checkpoint)
                updates = checkpoint["updates_done"] if checkpoint else 0
                await self.push(updates)
            elif updates % 2 == 0:
                checkpoint = await self.replay.state()
                assert checkpoint is not None and checkpoint["updates_done"] == updates
                await self.replay.commit(updates)

    def check(self, update: int, lease: Lease) -> None:
        plan = self.settings.plan
        for table, through in (
            ("student_text", plan.student_through),
            ("teacher_text", plan.teacher_through),
        ):
            assert draw_numbers(lease.groups, table) == list(range(through(update), through(update + 1)))
        assert max(lease.policy_ages, default=0) <= self.settings.max_policy_age
        self.uses[update] = lease


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2),
    st.dictionaries(st.integers(1, 60), st.booleans(), max_size=4),
    st.sets(st.integers(1, 6), max_size=2),
    st.booleans(),
)
def test_every_update_has_its_draws_wherever_the_process_dies(
    max_policy_age: int, deaths: dict[int, bool], backs: set[int], is_quick: bool
) -> None:
    run = Run(Settings(num_updates=6, max_policy_age=max_policy_age), dict(deaths), set(backs))
    run.mortal.is_quick = is_quick
    asyncio.run(run.train())
    assert sorted(run.uses) == list(range(6))


def test_what_a_dead_actor_sends_is_refused_by_the_successor_too() -> None:
    async def check() -> None:
        mortal = MortalReplay(Settings(), {5: False})
        replay = LastingReplay(mortal, None, mortal.revive, deadline_s=1)  # pyright: ignore[reportArgumentType]
        await replay.start()
        await replay.advance(0, 1)
        holder = Holder("rollout", 0)
        work = await replay.exchange(holder, [], [], 4)
        await replay.forget(holder)
        await replay.stats()  # it dies here
        assert mortal.num_deaths == 1
        answer = await replay.exchange(holder, [sample(work.work[0])], [], 4)
        assert answer.over and len(answer.refused) == 1

    asyncio.run(check())


CALLS: dict[str, tuple[Any, ...]] = {
    "advance": (0, 2), "acknowledge": (0,), "commit": (0,), "forget": (Holder("rollout", 9),), "go_back": (None,),
    "lease": (0,), "set_student_share": (0.5,), "spans": (), "stalled": (1.0,), "state": (), "stats": (),
}  # fmt: skip


@pytest.mark.parametrize("method", CALLS)
def test_a_successor_is_told_everything_before_it_answers(method: str) -> None:
    """Ray starts the process again by itself. If no call was under way, none has failed."""

    async def check() -> None:
        mortal = MortalReplay(Settings(max_policy_age=1), {})
        replay = LastingReplay(mortal, None, mortal.revive, deadline_s=1)  # pyright: ignore[reportArgumentType]
        await replay.start()
        await replay.advance(0, 1)
        fill(mortal.opened.index)
        assert await replay.lease(0)
        mortal.service = mortal.new()
        await getattr(replay, method)(*CALLS[method])
        assert mortal.opened._is_open

    asyncio.run(check())


def test_the_driver_has_a_call_for_everything_that_the_service_can_do() -> None:
    """Apart from the calls of actors, which repeat theirs, and those that begin and end it."""
    of_others = {"exchange", "live_segments", "take_over", "stop"}
    methods = {name for name in vars(ReplayService) if not name.startswith("_")} - of_others
    assert methods == set(CALLS)


def test_a_take_over_outlives_the_call_that_noticed_the_death() -> None:
    async def check() -> None:
        mortal = MortalReplay(Settings(), {3: False})
        may_revive, num_revived = asyncio.Event(), 0

        async def revive(error: Exception) -> None:
            nonlocal num_revived
            num_revived += 1
            await may_revive.wait()
            await mortal.revive(error)

        replay = LastingReplay(mortal, None, revive, deadline_s=1)  # pyright: ignore[reportArgumentType]
        await replay.start()
        await replay.advance(0, 1)
        call = asyncio.create_task(replay.stats())
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.sleep(0)
        may_revive.set()
        async with asyncio.timeout(1):
            assert (await replay.exchange(Holder("rollout", 1), [], [], 1)).work
        assert num_revived == 1

    asyncio.run(check())


def test_what_was_under_way_is_not_taken_for_what_is_issued_again() -> None:
    """The same actor may get the same draw from the successor, and still deliver the old sample."""

    async def check() -> None:
        mortal = MortalReplay(Settings(), {4: False})
        replay = LastingReplay(mortal, None, mortal.revive, deadline_s=1)  # pyright: ignore[reportArgumentType]
        await replay.start()
        await replay.advance(0, 1)
        holder = Holder("rollout", 0)
        [before] = (await replay.exchange(holder, [], [], 1)).work
        await replay.stats()  # it dies here
        [after] = (await replay.exchange(holder, [], [], 1)).work
        assert isinstance(before, Draw) and isinstance(after, Draw)
        assert (before.number, before.work_id != after.work_id) == (after.number, True)
        answer = await replay.exchange(holder, [sample(before)], [after.work_id], 0)
        assert answer.refused == (sample(before).work_id,)

    asyncio.run(check())
