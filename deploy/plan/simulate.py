"""A run of waiting engines in simulated time, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from actors.shells import ReplayActor
from deploy.plan.engines import run_engine, train
from deploy.plan.load import Load, Outcome
from deploy.plan.virtual_time import run_in_virtual_time
from distill.interfaces import Holder, Role
from distill.machine.clock import BusyClock
from distill.replay.past import IndexPast

_NUM_ROWS = 100_000
"""Prompts, and rows of teacher text: more than a simulation uses, so that none comes twice."""


def simulate(load: Load) -> Outcome:
    """Predict what a run takes. The result is the same every time."""
    return run_in_virtual_time(_run(load))


async def _run(load: Load) -> Outcome:
    config = load.config
    has_teacher_text = config.recipe.teacher_text != "none"
    replay = ReplayActor(config, _NUM_ROWS, _NUM_ROWS if has_teacher_text else 0)
    await replay.take_over(IndexPast(state=None))
    now = asyncio.get_running_loop().time
    clocks: dict[Role, list[BusyClock]] = {
        "rollout": [BusyClock(now) for _ in range(config.rollout.replicas)],
        "teacher": [BusyClock(now) for _ in range(config.scoring.replicas)],
    }

    async def counters() -> Mapping[str, float]:
        return engine_counters(clocks)

    async with asyncio.TaskGroup() as group:
        for role, of_role in clocks.items():
            for number, clock in enumerate(of_role):
                group.create_task(run_engine(replay, Holder(role, number), load, clock))
        return await train(replay, load, counters)


def engine_counters(clocks: Mapping[Role, list[BusyClock]]) -> dict[str, float]:
    """The counters of engines under the names of an actor's statistics."""
    counters: dict[str, float] = {}
    for role, of_role in clocks.items():
        counters[f"timing/{role}_busy_s"] = sum(clock.busy_s for clock in of_role)
        counters[f"{role}/num_actors"] = float(len(of_role))
    return counters
