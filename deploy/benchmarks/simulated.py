"""A run of waiting engines on a real Ray: the real replay actor, and :mod:`deploy.plan.engines` in light processes.

Many engines live in one light process, as asyncio clients with a desk each. The learner and the pushes are waits
in the driver, which runs the real train loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from deploy.plan.engines import run_engine, train
from deploy.plan.load import Load, Outcome
from deploy.plan.simulate import engine_counters
from deploy.run.training.fleet import added
from distill.interfaces import Holder, Role
from distill.machine.clock import BusyClock
from distill.machine.remote import Remote
from distill.replay.past import IndexPast

MAX_PROCESSES = 8


@dataclass(frozen=True, kw_only=True)
class RayOutcome(Outcome):
    """What a simulated run on Ray took."""

    cpu_s: Mapping[str, float]
    """CPU seconds per trajectory of the driver, the replay actor, and Ray's own processes; the engines' do not count."""

    @property
    def cpu_s_per_trajectory(self) -> float:
        return sum(self.cpu_s.values())


class Engines:
    """A process with some engines of one kind."""

    def __init__(self) -> None:
        self._clocks: dict[Role, list[BusyClock]] = {}

    def pid(self) -> int:
        return os.getpid()

    async def run(self, replay: Any, role: Role, numbers: Sequence[int], load: Load) -> None:
        """Work until the run is over."""
        remote: Any = Remote(replay)
        self._clocks[role] = [BusyClock() for _ in numbers]
        await asyncio.gather(
            *(
                run_engine(remote, Holder(role, number), load, clock)
                for number, clock in zip(numbers, self._clocks[role], strict=True)
            )
        )

    async def stats(self) -> dict[str, float]:
        return engine_counters(self._clocks)


def simulate_on_ray(cluster: Any, load: Load) -> RayOutcome:
    """Run once on a :class:`deploy.cluster.ray_cluster.RayCluster` that is open."""
    from actors.shells import ReplayActor

    config = load.config
    replay = cluster.start_actor("replay", ReplayActor, config, 100_000, 0, num_threads=1)
    cluster.wait({"replay": replay.take_over.remote(IndexPast(state=None))})
    names = ["replay"]
    actors: list[Any] = []
    calls: list[Any] = []
    pools: tuple[tuple[Role, int], ...] = (
        ("rollout", config.rollout.replicas),
        ("teacher", config.scoring.replicas),
    )
    for role, count in pools:
        processes = min(MAX_PROCESSES // 2, count)
        for number in range(processes):
            name = f"{role}-engines-{number}"
            actor = cluster.start_actor(name, Engines, num_threads=1)
            names.append(name)
            numbers = list(range(number, count, processes))
            actors.append(actor)
            calls.append(actor.run.remote(replay, role, numbers, load))
    control = {
        "driver": [psutil.Process()],
        "replay": [psutil.Process(cluster.actor_pid("replay"))],
        "ray": [psutil.Process(pid) for pid in cluster.service_pids()],
    }
    try:
        before = {name: cpu_s_of(processes) for name, processes in control.items()}
        outcome = asyncio.run(_train(load, replay, actors, calls))
        spent = {name: cpu_s_of(processes) - before[name] for name, processes in control.items()}
    finally:
        for name in names:
            cluster.end_actor(name)
    num_trajectories = config.learner.prompts_per_update * config.learner.num_updates
    return RayOutcome(
        updates_per_s=outcome.updates_per_s,
        samples_per_s=outcome.samples_per_s,
        row=outcome.row,
        cpu_s={name: cpu_s / num_trajectories for name, cpu_s in spent.items()},
    )


async def _train(load: Load, replay: Any, actors: Sequence[Any], calls: Sequence[Any]) -> Outcome:
    async def counters() -> Mapping[str, float]:
        return added([await actor.stats.remote() for actor in actors])

    service: Any = Remote(replay)
    outcome = await train(service, load, counters)
    await asyncio.gather(*calls)
    return outcome


def cpu_s_of(processes: Sequence[psutil.Process]) -> float:
    """CPU seconds of some processes so far."""
    total = 0.0
    for process in processes:
        times = process.cpu_times()
        total += times.user + times.system
    return total
