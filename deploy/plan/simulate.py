"""A run of waiting engines in simulated time, in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from actors.shells import ReplayActor
from deploy.plan.engines import run_engine, train
from deploy.plan.load import Load, Outcome, Service
from deploy.plan.virtual_time import run_in_virtual_time
from distill.interfaces import Holder, Role
from distill.machine.clock import BusyClock

_NUM_PROMPTS = 100_000


def simulate(load: Load) -> Outcome:
    """Predict what a run takes. The result is the same every time."""
    return run_in_virtual_time(_run(load))


async def _run(load: Load) -> Outcome:
    replay = ReplayActor(load.config, _NUM_PROMPTS, 0)
    now = asyncio.get_running_loop().time
    clocks: dict[Role, list[BusyClock]] = {"rollout": [], "teacher": []}
    pools: tuple[tuple[Role, int, Service, int], ...] = (
        ("rollout", load.num_rollouts, load.rollout, load.rollout_capacity),
        ("teacher", load.num_teachers, load.teacher, load.teacher_capacity),
    )

    async def counters() -> Mapping[str, float]:
        return engine_counters(clocks)

    async with asyncio.TaskGroup() as group:
        for role, count, service, capacity in pools:
            for number in range(count):
                clocks[role].append(BusyClock(now))
                engine = run_engine(
                    replay,
                    Holder(role, number),
                    service,
                    clocks[role][-1],
                    capacity=capacity,
                    together=load.lock_step,
                )
                group.create_task(engine)
        return await train(replay, load, counters)


def engine_counters(clocks: Mapping[Role, list[BusyClock]]) -> dict[str, float]:
    """The counters of engines under the names of an actor's statistics."""
    counters: dict[str, float] = {}
    for role, of_role in clocks.items():
        counters[f"timing/{role}_busy_s"] = sum(clock.busy_s for clock in of_role)
        counters[f"{role}/num_actors"] = float(len(of_role))
    return counters
