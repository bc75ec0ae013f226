"""What happens to an actor that fails: its work is given back, it is killed, and an heir takes its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.cluster.failures import ActorFailed, ActorGone, BackendEnded
from deploy.run.training import crew as crew_module
from deploy.run.training.crew import Crew
from deploy.run.training.evaluations import Evaluations
from deploy.run.training.fleet import Fleet, Member
from deploy.run.training.restarts import RestartBudget
from distill.config import RunConfig
from distill.config.tree import with_settings
from distill.errors import ConfigError
from distill.interfaces import Holder, WeightManifest

NEWEST = WeightManifest(policy_version=7, update=4, path="", num_bytes=0, checksum="")


class Engine:
    """An actor without process. Its loop runs until a test lets it fail."""

    def __init__(self, holder: Holder, log: list[str]) -> None:
        self.name = str(holder)
        self.log = log
        self.counters = {"rollout/num_actors": 1.0, "rollout/num_samples": 3.0}
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answers = True
        self.broken_loads = 0

    def die(self) -> None:
        if not self.failure.done():
            self.failure.set_exception(ActorFailed(self.name, "", "live; it died"))

    async def run(self, replay: Any) -> None:
        self.log.append(f"run {self.name}")
        await self.failure

    async def result(self, loading: Any) -> None:
        await loading

    async def within(self, seconds: float | None, method: str, *args: Any, setting: str = "") -> Any:
        if not self.answers:
            raise ActorGone.silent(self.name, 1.0, setting)
        if method == "update_weights":
            self.log.append(f"load {args[0].policy_version} {self.name}")
            return None
        if method == "retire":
            self.log.append(f"retire {self.name}")
            if not self.failure.done():
                self.failure.set_result(None)
            return None
        assert method == "stats"
        return dict(self.counters)

    async def idle(self) -> None:
        self.log.append(f"idle {self.name}")

    async def sample_heldout(self, numbers: list[int]) -> list[str]:
        if self.failure.done():
            raise ActorFailed(self.name, "", "live; it died")
        return [f"{self.name}:{number}" for number in numbers]


class Replay:
    handle = None

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.stalled: dict[Holder, float] = {}
        self.deadlines: set[float | None] = set()

    async def forget(self, holder: Holder) -> None:
        self.log.append(f"forget {holder}")

    async def go_back(self, state: Any) -> None:
        self.log.append(f"go back to {state}")

    async def within(self, seconds: float | None, method: str, *args: Any) -> Any:
        self.deadlines.add(seconds)
        return {"stalled": self.stalled, "stats": {}}[method]


class Learner:
    name = "learner"

    def __init__(self) -> None:
        self.answers = True

    async def within(self, seconds: float | None, method: str) -> dict[str, float]:
        if not self.answers:
            raise ActorGone.silent(self.name, 1.0, "")
        return {}

    async def result(self, loading: Any) -> Any:
        return await loading


class Publisher:
    newest = NEWEST

    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[None]:
        yield


class World:
    """A crew of two rollout actors and one teacher actor, whose heirs start as planned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, budget: Any = None, **settings: Any) -> None:
        self.log: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.starts: list[Exception | None] = []
        """What the next starts raise; None, and after the last of them: nothing."""
        self.fleet = Fleet(
            replay=Replay(self.log),  # pyright: ignore[reportArgumentType]
            learner=Learner(),  # pyright: ignore[reportArgumentType]
            rollouts=[self.member(Holder("rollout", number)) for number in range(2)],
            scorers=[self.member(Holder("teacher", 0))],
            teachers=[],
        )
        self.fleet.teachers = self.fleet.scorers
        config = with_settings(RunConfig(), dict(settings))
        self.load_s = 0.0
        self.raylet_lives = True
        self.states: list[Any] = []
        """What the next learners load: a checkpoint's state, None, or an exception that they raise."""

        async def load() -> Any:
            state = self.states.pop(0)
            if isinstance(state, Exception):
                raise state
            return state

        run: Any = SimpleNamespace(
            config=config,
            start_learner=lambda: self.log.append("start learner"),
            learner=SimpleNamespace(load=SimpleNamespace(remote=lambda inputs: load())),
            backend=SimpleNamespace(
                kill_actor=lambda name, pid=None: self.log.append(f"kill {name}"),
                end_actor=lambda name: self.log.append(f"end {name}"),
                actor_pid=lambda name: 1,
                require_life=self.require_life,
            ),
            progress=SimpleNamespace(say=lambda text: None),
            restarts=budget or RestartBudget(config.cluster),
            note_damage=lambda state: None,
            note_failure=lambda actor, error, then: self.events.append(("member_failed", actor)),
            note_replaced=lambda actor, heir, *seconds: self.events.append(("member_replaced", heir)),
        )
        inputs: Any = SimpleNamespace(segments=None, run_dir="x", weights=Path("no such folder"))
        monkeypatch.setattr(crew_module, "start_member", self.start_member)
        monkeypatch.setattr(crew_module, "learner_actor", lambda run: Learner())
        monkeypatch.setattr(crew_module, "BEAT_EVERY_S", 0.01)
        monkeypatch.setattr(crew_module, "delete_segments_of", self.delete)
        self.make = lambda group: Crew(
            run,
            inputs,
            self.fleet,
            Publisher(),
            group,  # pyright: ignore[reportArgumentType]
        )

    def require_life(self) -> None:
        if not self.raylet_lives:
            raise BackendEnded.process("raylet", 7)

    async def delete(self, *_: Any) -> None:
        pass

    def member(self, holder: Holder) -> Member:
        return Member(holder, Engine(holder, self.log))  # pyright: ignore[reportArgumentType]

    def start_member(self, run: Any, inputs: Any, role: Any, number: int, *, restart: int) -> Any:
        async def load() -> None:
            await asyncio.sleep(self.load_s)
            if self.starts and (error := self.starts.pop(0)) is not None:
                raise error

        async def member() -> Member:
            return self.member(Holder(role, number, restart))

        # The real one runs in a thread as well.
        made = asyncio.run_coroutine_threadsafe(member(), self.loop).result(5)
        self.log.append(f"start {made.holder}")
        return made, load()

    async def until(self, name: str, count: int = 1) -> None:
        async with asyncio.timeout(5):
            while sum(event == name for event, _ in self.events) < count:
                await asyncio.sleep(0.005)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[Crew]:
        self.loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            crew = self.make(group)
            crew.start()
            await asyncio.sleep(0.02)
            yield crew
            crew.stop()
            for task in crew._loops.values():
                task.cancel()


def engine(member: Member) -> Engine:
    return member.actor  # pyright: ignore[reportReturnType]


async def test_a_dead_actor_is_fenced_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    async with world.working():
        first = world.fleet.rollouts[0]
        engine(first).die()
        await world.until("member_replaced")
        await asyncio.sleep(0.01)
        assert [str(each.holder) for each in world.fleet.rollouts] == ["rollout-0.1", "rollout-1.0"]
        assert world.log[3:] == [
            "forget rollout-0.0", "kill rollout-0.0", "start rollout-0.1", "load 7 rollout-0.1", "run rollout-0.1",
        ]  # fmt: skip
        assert await world.fleet.heir(first) is world.fleet.rollouts[0]
        counters = await world.fleet.stats_of(world.fleet.rollouts)
        assert set(counters) == {"rollout-0.1", "rollout-1.0"}
        assert world.fleet.departed == {first.holder: {"rollout/num_samples": 3.0}}
    assert [name for name, _ in world.events] == ["member_failed", "member_replaced"]


@pytest.mark.parametrize("cause", ["no answer", "no progress", "no push"])
async def test_whatever_is_wrong_with_an_actor_ends_the_same_way(
    monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    world = World(monkeypatch)
    async with world.working():
        [member] = world.fleet.scorers
        if cause == "no answer":
            engine(member).answers = False
        elif cause == "no progress":
            replay: Any = world.fleet.replay
            replay.stalled[member.holder] = 3000.0
        else:
            world.fleet.failed(member, ActorFailed("teacher-0.0", "", "load"))
        await world.until("member_replaced")
        assert [str(each.holder) for each in world.fleet.scorers] == ["teacher-0.1"]
        assert world.fleet.teachers is world.fleet.scorers
        assert "load 7 teacher-0.1" not in world.log  # a teacher has no weights to load


async def test_an_heir_that_fails_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.starts = [ActorFailed("x", "", "start"), ActorFailed("x", "", "start"), None]
    async with world.working():
        engine(world.fleet.rollouts[1]).die()
        await world.until("member_replaced")
        assert [str(each.holder) for each in world.fleet.rollouts] == ["rollout-0.0", "rollout-1.3"]
        assert [line for line in world.log if line.startswith("kill")] == [
            f"kill rollout-1.{incarnation}" for incarnation in range(3)
        ]


async def test_a_training_that_is_over_waits_for_no_heir(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.load_s = 60.0
    async with asyncio.timeout(5), world.working():
        engine(world.fleet.rollouts[1]).die()
        await world.until("member_failed")


async def test_too_many_failures_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, **{"cluster.max_restarts": 2})
    world.starts = [ActorFailed("x", "", "start; it has no memory")] * 5
    with pytest.raises(ExceptionGroup) as caught:
        async with world.working():
            engine(world.fleet.rollouts[1]).die()
            await asyncio.sleep(5)
    [error] = caught.value.exceptions
    assert "failed after 2 restarts" in str(error) and "no memory" in str(error)


async def test_a_wrong_setting_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.starts = [ConfigError("model", "x", "exist")]
    with pytest.raises(ExceptionGroup) as caught:
        async with world.working():
            engine(world.fleet.rollouts[1]).die()
            await asyncio.sleep(5)
    assert isinstance(caught.value.exceptions[0], ConfigError)
    assert sum(line.startswith("start") for line in world.log) == 1


async def test_an_evaluation_is_finished_by_the_heir(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the part of the one that failed, so that the result is the same."""
    world = World(monkeypatch)
    evaluations = Evaluations(world.fleet, Publisher(), None, None, of_copy=False)  # pyright: ignore[reportArgumentType]
    async with world.working():
        engine(world.fleet.rollouts[0]).die()
        samples: Any = await evaluations._divided(
            range(5), world.fleet.rollouts, lambda each, numbers: each.actor.sample_heldout(numbers)
        )
    assert samples == ["rollout-0.1:0", "rollout-1.0:1", "rollout-0.1:2", "rollout-1.0:3", "rollout-0.1:4"]


@pytest.mark.parametrize("lock_step", [True, False])
async def test_a_learner_that_is_gone_starts_from_its_newest_checkpoint(
    monkeypatch: pytest.MonkeyPatch, lock_step: bool
) -> None:
    world = World(monkeypatch, **{"replay.max_policy_age": 0 if lock_step else 2})
    world.states = [ActorGone.died("learner", "no memory"), {"updates_done": 4, "ledger": "that of 4"}]
    async with world.working() as crew:
        old, before = world.fleet.learner, len(world.log)
        state = await crew.replace_learner(ActorGone.died("learner", "killed"))
        assert world.fleet.learner is not old
    assert state == {"updates_done": 4, "ledger": "that of 4"}
    idle = ["idle rollout-0.0", "idle rollout-1.0"] if lock_step else []
    assert world.log[before:] == ["start learner", "start learner", *idle, "go back to that of 4"]
    assert [name for name, _ in world.events] == ["member_failed", "member_failed", "member_replaced"]


async def test_a_learner_without_checkpoint_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.states = [None]
    async with world.working() as crew:
        assert await crew.replace_learner(ActorGone.died("learner", "killed")) is None
    assert world.log[-1] == "go back to None"


async def test_a_learner_that_does_not_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that the train loop waits for fails then, and `train_fleet` has it replaced."""
    world = World(monkeypatch)
    async with world.working():
        learner: Any = world.fleet.learner
        learner.answers = False
        async with asyncio.timeout(5):
            while "kill learner" not in world.log:
                await asyncio.sleep(0.01)
        learner.answers = True


async def test_a_run_ends_when_no_actor_can_start_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    with pytest.RaisesGroup(BackendEnded):
        async with world.working():
            world.raylet_lives = False
            await asyncio.sleep(5)


@pytest.mark.parametrize("fails", [False, True], ids=["well", "failing"])
async def test_a_pool_shrinks_also_while_a_member_is_replaced(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    world = World(monkeypatch)
    async with world.working() as crew:
        leaving = world.fleet.rollouts[1]
        if fails:
            engine(leaving).die()
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await crew.resize("rollout", 1)
        assert [str(each.holder) for each in world.fleet.rollouts] == ["rollout-0.0"]
        last = "rollout-1.1" if fails else "rollout-1.0"
        assert [line for line in world.log if line.startswith("end")] == [f"end {last}"]
        assert all(holder.number == 1 for holder in world.fleet.departed)


async def test_where_actors_share_a_thread_no_answer_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes holds up the others, which are well."""
    world = World(monkeypatch)
    world.fleet.beat_timeout_s = None
    async with world.working():
        await asyncio.sleep(0.05)
    replay: Any = world.fleet.replay
    assert replay.deadlines == {None}


async def test_a_member_that_fails_just_after_it_was_asked_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop is gone then, and its heir leaves."""
    world = World(monkeypatch)
    async with world.working() as crew:
        leaving = world.fleet.rollouts[1]

        async def retire_and_fail(seconds: float | None, method: str, *args: Any, setting: str = "") -> Any:
            if method == "retire":
                world.fleet.failed(leaving, ActorGone.died("rollout-1.0", "killed"))
                while leaving in crew._loops:
                    await asyncio.sleep(0)
            return {}

        engine(leaving).within = retire_and_fail
        async with asyncio.timeout(5):
            await crew.resize("rollout", 1)
        assert [str(each.holder) for each in world.fleet.rollouts] == ["rollout-0.0"]
        assert "end rollout-1.1" in world.log
