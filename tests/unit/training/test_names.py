"""Names of actors, which are never used again within a run."""

from __future__ import annotations

import pytest

from deploy.cluster.failures import ActorGone
from deploy.run.training.restarts import RestartBudget
from distill.config import ClusterConfig
from tests.unit.training.test_crew import World, engine


async def test_heirs_have_other_names_than_actors_of_a_start_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = RestartBudget(ClusterConfig())
    for _ in range(2):  # before the training
        budget.take("teacher-0.0", ActorGone.died("teacher-0.0", "x"))
    world = World(monkeypatch, budget=budget)
    async with world.working():
        engine(world.fleet.rollouts[0]).die()
        await world.until("member_replaced")
        assert str(world.fleet.rollouts[0].holder) == "rollout-0.3"
