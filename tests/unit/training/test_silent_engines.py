"""An engine that hangs is noticed by what its actor, which answers, says of it: also in an evaluation."""

from __future__ import annotations

import asyncio

import pytest

from deploy.cluster.failures import ActorFailed
from deploy.run.training.evaluations import Evaluations
from distill.machine.clock import SILENT
from tests.unit.training.test_crew import Publisher, World, engine


async def test_an_actor_whose_engine_is_silent_for_too_long_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.fleet.stall_timeout_s = 30.0
    async with world.working():
        first = world.fleet.rollouts[0]
        engine(first).counters[SILENT] = 29.0
        counters = await world.fleet.stats_of([first])
        assert SILENT not in counters["rollout-0.0"] | await world.fleet.stats()
        assert SILENT not in (await world.fleet.stats_now())["rollout-0.0"]
        assert world.fleet.serves(first)
        engine(first).counters[SILENT] = 31.0
        await world.until("member_replaced")
        assert [str(each.holder) for each in world.fleet.rollouts] == ["rollout-0.1", "rollout-1.0"]
        assert world.events[0] == ("member_failed", "rollout-0.0")


async def test_an_evaluation_continues_with_the_heir_of_a_silent_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    world.fleet.stall_timeout_s = 30.0
    async with world.working():
        first = world.fleet.rollouts[0]

        async def hangs(numbers: list[int]) -> list[str]:
            engine(first).counters[SILENT] = 31.0
            while "kill rollout-0.0" not in world.log:
                await asyncio.sleep(0.005)
            raise ActorFailed("rollout-0.0", "", "live; it died")

        monkeypatch.setattr(engine(first), "sample_heldout", hangs)
        evaluations = Evaluations(world.fleet, Publisher(), None, None, of_copy=False)  # pyright: ignore[reportArgumentType]
        async with asyncio.timeout(5):
            samples = await evaluations._divided(
                range(4), world.fleet.rollouts, lambda each, numbers: each.actor.sample_heldout(numbers)
            )
        assert samples == ["rollout-0.1:0", "rollout-1.0:1", "rollout-0.1:2", "rollout-1.0:3"]
