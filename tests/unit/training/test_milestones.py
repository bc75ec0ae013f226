"""What the driver records around an update."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest

from deploy.run.training.milestones import RunMilestones, Spent
from deploy.run.training.room import Room
from distill.config import CheckpointConfig, EvaluationConfig, LearnerConfig, ReplayConfig, RunConfig
from distill.interfaces import Lease
from distill.room import NoSpace


async def events_of(*counters: float | None) -> list[dict[str, Any]]:
    """The events after updates whose metrics have these counts of skipped updates. The learner knows of update 2."""
    events: list[dict[str, Any]] = []
    asked: list[int] = []

    async def skipped(update: int) -> dict[str, Any] | None:
        asked.append(update)
        return {"update": 2, "stage": "scores", "file": "x"} if update == 2 else None

    async def stats() -> dict[str, float]:
        return {}

    recorder = SimpleNamespace(
        update=lambda *_: None,
        note_draws=lambda *_: None,
        start_clock=lambda: None,
        event=lambda name, **fields: events.append({"event": name} | fields),
    )
    config = RunConfig(learner=LearnerConfig(num_updates=9), evaluation=EvaluationConfig(every=0))
    fleet = SimpleNamespace(learner=SimpleNamespace(skipped=skipped))
    parts: list[Any] = [None, fleet, recorder, None, None, stats, Spent(), Room(0.0)]
    milestones = RunMilestones(config, *cast(Any, parts))
    for update, count in enumerate(counters, 1):
        metrics = {} if count is None else {"learner/num_nonfinite": count}
        await milestones.after_update(
            update, update, Lease(update=update - 1, groups=(), policy_ages=()), metrics
        )
    assert asked == [update for update, count in enumerate(counters, 1) if count]
    return events


async def test_a_skipped_update_is_one_event() -> None:
    skipped = {"event": "update_skipped", "update": 2, "stage": "scores", "file": "x"}
    assert await events_of(0, 1, 1, 1) == [skipped]
    assert await events_of(0, 0, 0) == await events_of(None) == []


async def test_a_checkpoint_that_fails_beside_the_updates_ends_the_run_at_the_next() -> None:
    """And not only when the next checkpoint is due."""

    async def save(update: int, state: dict[str, Any]) -> float:
        raise NoSpace("free space", "1 byte", "be enough")

    async def nothing(*_: Any) -> dict[str, float]:
        return {}

    fleet = SimpleNamespace(
        learner=SimpleNamespace(save=save), replay=SimpleNamespace(state=nothing, commit=nothing)
    )
    recorder = MagicMock()
    config = RunConfig(
        learner=LearnerConfig(num_updates=9),
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=5),
        replay=ReplayConfig(max_policy_age=2),
    )
    parts: list[Any] = [None, fleet, recorder, None, MagicMock(), nothing, Spent(), Room(0.0)]
    milestones = RunMilestones(config, *cast(Any, parts))
    lease = Lease(update=4, groups=(), policy_ages=())
    await milestones.after_update(5, 5, lease, {})
    await asyncio.sleep(0.01)
    with pytest.raises(NoSpace):
        await milestones.after_update(6, 6, lease, {})
    assert recorder.note_draws.call_count == 1
