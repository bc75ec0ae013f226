"""Benchmark ``scale``: what the control plane costs per trajectory as the number of engines grows.

The control plane is the driver, the replay actor, the raylet and the GCS. Engines wait, so everything that these
processes do is bookkeeping. ``growth`` is the largest cost at 1 to 256 engines / the smallest; the notes have each.
"""

from __future__ import annotations

from deploy.benchmarks.harness import Measurement, Say
from deploy.benchmarks.simulated import Load, simulate
from distill.config import ClusterConfig

NUM_ENGINES = (1, 4, 16, 64, 256)
TRAJECTORIES_PER_S = 100.0
"""The same load at every size, so that only the number of engines differs."""
NUM_UPDATES, PROMPTS_PER_UPDATE = 20, 64


def measure(num_pairs: int, say: Say) -> Measurement:
    """Measure every size ``num_pairs`` times."""
    from deploy.cluster.ray_cluster import RayCluster

    costs: list[dict[int, float]] = []
    with RayCluster(ClusterConfig(address="local"), "bbbbbbbc") as cluster:
        simulate(cluster, _load(4, num_updates=2))  # imports and connections
        for number in range(num_pairs):
            found: dict[int, float] = {}
            for num_engines in NUM_ENGINES if number % 2 == 0 else NUM_ENGINES[::-1]:
                say(f"round {number + 1} of {num_pairs}: {num_engines} engines")
                outcome = simulate(cluster, _load(num_engines, num_updates=NUM_UPDATES))
                found[num_engines] = 1e3 * outcome.cpu_s_per_trajectory
            costs.append(found)
    return Measurement(
        pairs={
            "growth": [(max(found.values()), min(found.values())) for found in costs],
            "ms": [(max(found.values()), 1.0) for found in costs],
        },
        notes={"cpu_ms_per_trajectory": [{str(n): cost for n, cost in found.items()} for found in costs]},
    )


def _load(num_engines: int, *, num_updates: int) -> Load:
    """Rollout engines and a quarter as many teachers, at a fixed rate of the whole."""
    num_teachers = max(1, num_engines // 4)
    return Load(
        num_rollouts=num_engines,
        num_teachers=num_teachers,
        prompts_per_update=PROMPTS_PER_UPDATE,
        num_updates=num_updates,
        max_policy_age=max(2, 2 * num_engines // PROMPTS_PER_UPDATE),
        rollout_s=num_engines / TRAJECTORIES_PER_S,
        teacher_s=num_teachers / TRAJECTORIES_PER_S,
        update_s=PROMPTS_PER_UPDATE / TRAJECTORIES_PER_S,
        push_s=0.0,
    )
