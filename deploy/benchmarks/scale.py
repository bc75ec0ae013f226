"""Benchmark ``scale``: what the control plane costs per trajectory as the number of engines grows.

The control plane is the driver, the replay actor, the raylet and the GCS. Engines wait, so everything that these
processes do is bookkeeping. ``growth`` is the largest cost at 1 to 256 engines / the smallest; the notes have each.

A trajectory takes two calls of the replay actor, one of the engine that samples it and one of the engine that scores
it. The notes have what two calls of an actor cost that does nothing, at the same rate: no bookkeeping costs less.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from typing import Any

import psutil

from deploy.benchmarks.harness import Measurement, Say
from deploy.benchmarks.simulated import cpu_s_of, simulate_on_ray
from deploy.plan.load import Load, Service, waiting_config
from distill.config import ClusterConfig

NUM_ENGINES = (1, 4, 16, 64, 256)
TRAJECTORIES_PER_S = 100.0
"""The same load at every size, so that only the number of engines differs."""
NUM_UPDATES, PROMPTS_PER_UPDATE = 20, 64
CALLS = 2
"""Of the replay actor, per trajectory."""


def measure(num_pairs: int, say: Say) -> Measurement:
    """Measure every size ``num_pairs`` times."""
    from deploy.cluster.ray_cluster import RayCluster

    costs: list[dict[int, float]] = []
    parts: list[dict[str, float]] = []
    with RayCluster(ClusterConfig(address="local"), "bbbbbbbc") as cluster:
        simulate_on_ray(cluster, _load(4, num_updates=2))  # imports and connections
        for number in range(num_pairs):
            found: dict[int, float] = {}
            for num_engines in NUM_ENGINES if number % 2 == 0 else NUM_ENGINES[::-1]:
                say(f"round {number + 1} of {num_pairs}: {num_engines} engines")
                outcome = simulate_on_ray(cluster, _load(num_engines, num_updates=NUM_UPDATES))
                found[num_engines] = 1e3 * outcome.cpu_s_per_trajectory
                parts.append({name: 1e3 * cpu_s for name, cpu_s in outcome.cpu_s.items()})
            costs.append(found)
        say("an actor that does nothing")
        bare_ms = [1e3 * CALLS * _cpu_s_of_a_bare_call(cluster) for _ in range(num_pairs)]
    return Measurement(
        pairs={
            "growth": [(max(found.values()), min(found.values())) for found in costs],
            "ms": [(max(found.values()), 1.0) for found in costs],
        },
        notes={
            "cpu_ms_per_trajectory": [{str(n): cost for n, cost in found.items()} for found in costs],
            "cpu_ms_by_process": {name: statistics.median(each[name] for each in parts) for name in parts[0]},
            "cpu_ms_of_two_bare_calls": bare_ms,
        },
    )


class Nothing:
    """An actor whose calls return at once."""

    def pid(self) -> int:
        return os.getpid()

    async def exchange(self, holder: str, work: list[int]) -> list[int]:
        return work


class Callers:
    """A process that calls another actor, as some engines do."""

    def pid(self) -> int:
        return os.getpid()

    async def call(self, actor: Any, num_callers: int, num_calls: int, per_s: float) -> None:
        """Each caller makes its calls one after the other."""

        async def one(number: int) -> None:
            for _ in range(num_calls):
                await actor.exchange.remote(str(number), [number])
                await asyncio.sleep(num_callers / per_s)

        await asyncio.gather(*map(one, range(num_callers)))


def _cpu_s_of_a_bare_call(cluster: Any) -> float:
    """CPU seconds of the called process per call, at the rate of calls of a run."""
    actor = cluster.start_actor("nothing", Nothing, num_threads=1)
    callers = [cluster.start_actor(f"callers-{number}", Callers, num_threads=1) for number in range(2)]
    process = psutil.Process(cluster.actor_pid("nothing"))
    num_callers, num_calls = 8, 40

    async def call_all() -> None:
        share = CALLS * TRAJECTORIES_PER_S / len(callers)
        await asyncio.gather(*(each.call.remote(actor, num_callers, num_calls, share) for each in callers))

    try:
        asyncio.run(call_all())  # imports and connections
        before = cpu_s_of([process])
        asyncio.run(call_all())
        cpu_s = cpu_s_of([process]) - before
    finally:
        for name in ("nothing", *(f"callers-{number}" for number in range(len(callers)))):
            cluster.end_actor(name)
    return cpu_s / (len(callers) * num_callers * num_calls)


def _load(num_engines: int, *, num_updates: int) -> Load:
    """Rollout engines and a quarter as many teachers, at a fixed rate of the whole."""
    num_teachers = max(1, num_engines // 4)
    return Load(
        config=waiting_config(
            num_rollouts=num_engines,
            num_teachers=num_teachers,
            prompts_per_update=PROMPTS_PER_UPDATE,
            num_updates=num_updates,
            max_policy_age=max(2, 2 * num_engines // PROMPTS_PER_UPDATE),
        ),
        rollout=Service(num_engines / TRAJECTORIES_PER_S),
        teacher=Service(num_teachers / TRAJECTORIES_PER_S),
        update=Service(1 / TRAJECTORIES_PER_S),
        push_s=0.0,
    )
