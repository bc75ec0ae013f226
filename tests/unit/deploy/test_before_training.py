"""The stages before the training begin again when an actor dies or hangs, as often as the run's budget allows."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.cluster.failures import ActorFailed, ActorGone
from deploy.run.before_training import outliving, wait_for_work
from deploy.run.training.restarts import RestartBudget
from distill.config import ClusterConfig
from distill.errors import ConfigError
from distill.interfaces import EngineDied


class World:
    """A run whose actor gives planned answers, one per second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Any, **settings: Any) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.answers = list(answers)
        self.shown: list[Any] = []
        config = ClusterConfig(**settings)
        self.run: Any = SimpleNamespace(
            config=SimpleNamespace(cluster=config),
            restarts=RestartBudget(config),
            note_failure=lambda actor, error, then: self.log.append(f"{actor} failed"),
            kill_actors=lambda: self.log.append("kill"),
            start_learner=lambda: self.log.append("start learner"),
            backend=SimpleNamespace(poll=lambda question: question, wait=self.wait),
        )
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def wait(self, calls: dict[str, Any], *, tick: Any) -> dict[str, Any]:
        for _ in range(len(self.answers)):
            self.now += 1.0
            tick()
        return calls

    def work(self) -> Any:
        return wait_for_work(self.run, "corpus", "done", lambda: self.answers.pop(0), self.shown.append)


def test_the_stage_begins_again_with_new_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    failures = [
        ActorGone.died("corpus", "x"),
        ActorGone.silent("learner", 1.0, "y"),
        EngineDied("corpus", "", "live; its core has ended"),
    ]

    @outliving
    def stage(run: Any, inputs: str) -> str:
        if failures:
            raise failures.pop(0)
        return inputs + " done"

    assert stage(world.run, "corpus") == "corpus done"
    again = ["kill", "start learner"]
    assert world.log == ["corpus failed", *again, "learner failed", *again, "corpus failed", *again]


def test_a_learner_that_cannot_start_again_is_one_more_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    world, failures = World(monkeypatch), [ActorGone.died("corpus", "x"), ActorGone.died("learner", "y")]

    def fail() -> None:
        if failures:
            raise failures.pop(0)

    world.run.start_learner = fail
    assert outliving(lambda run: fail() or "done")(world.run) == "done"
    assert world.log == ["corpus failed", "kill", "learner failed", "kill"]


def test_a_deadline_that_passes_twice_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is more likely too short, and the error says which it is."""
    world, late = World(monkeypatch), ActorGone.late(["teacher-0.1000"], 600.0)

    @outliving
    def stage(run: Any) -> None:
        raise late

    with pytest.raises(ActorGone) as raised:
        stage(world.run)
    assert raised.value is late and world.log.count("kill") == 1


def test_actors_of_this_process_are_not_started_again_beside_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, late = World(monkeypatch, backend="in_process"), ActorGone.late(["learner"], 600.0)

    @outliving
    def stage(run: Any) -> None:
        raise late

    with pytest.raises(ActorGone):
        stage(world.run)
    assert world.log == []


@pytest.mark.parametrize("error", [ConfigError("a", 1, "be 2", "set it"), ActorFailed("a", 1, "work", "x")])
def test_what_would_come_back_ends_the_run(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    world = World(monkeypatch)

    @outliving
    def stage(run: Any) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        stage(world.run)
    assert raised.value is error and world.log == []


def test_the_budget_of_the_run_bounds_the_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, max_restarts=2)

    @outliving
    def stage(run: Any) -> None:
        raise ActorGone.died("corpus", "x")

    with pytest.raises(ActorFailed, match="after 2 restarts"):
        stage(world.run)
    assert world.log.count("kill") == 2


def test_answers_are_shown_and_the_result_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, {"rows": 1}, None, {"rows": 2})
    assert world.work() == "done"
    assert world.shown == [{"rows": 1}, {"rows": 2}]


def test_an_actor_that_does_not_answer_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, {"rows": 1}, *[None] * 9, beat_timeout_s=4.0)
    with pytest.raises(ActorGone, match=r"cluster\.beat_timeout_s"):
        world.work()
    assert world.now == 6.0
    slow = World(monkeypatch, *[{"rows": 1}, None, None, None] * 3, beat_timeout_s=4.0)
    assert slow.work() == "done"
    alone = World(monkeypatch, *[None] * 9, beat_timeout_s=4.0, backend="in_process")
    assert alone.work() == "done", "an actor that computes in this process cannot answer"
    alone = World(monkeypatch, *[None] * 9, stall_timeout_s=4.0, backend="in_process")
    assert alone.work() == "done"


def test_an_actor_without_progress_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, *({"rows": 1} for _ in range(20)), stall_timeout_s=8.0)
    with pytest.raises(ActorGone, match=r"cluster\.stall_timeout_s"):
        world.work()
    assert world.now == 10.0
    slow = World(monkeypatch, *({"rows": second // 5} for second in range(40)), stall_timeout_s=8.0)
    assert slow.work() == "done"
