"""Benchmark ``pipeline``: whether the loops overlap as they should.

``slowest``: the rate of a run / that of its slowest stage alone, with 64 rollout and 16 teacher engines and equal rates
of all stages. ``lockstep``: the same run / the run in lock-step, where the stages take turns; with three equal stages
the ratio can be three, and more by what the push takes.
"""

from __future__ import annotations

from deploy.benchmarks.harness import Measurement, Say, alternate
from deploy.benchmarks.simulated import simulate_on_ray
from deploy.plan.load import Load, Service, waiting_config
from distill.config import ClusterConfig

LOAD = Load(
    config=waiting_config(
        num_rollouts=64, num_teachers=16, prompts_per_update=64, num_updates=24, max_policy_age=3
    ),
    rollout=Service(1.0),
    teacher=Service(0.25),
    update=Service(1.0 / 64),
    push_s=0.1,
)
LOCK_STEP = LOAD.changed({"replay.max_policy_age": 0, "learner.num_updates": 8})


def measure(num_pairs: int, say: Say) -> Measurement:
    """Alternate asynchronous runs and runs in lock-step."""
    from deploy.cluster.ray_cluster import RayCluster

    with RayCluster(ClusterConfig(address="local"), "bbbbbbbb") as cluster:
        sides = {
            "asynchronous": lambda: simulate_on_ray(cluster, LOAD),
            "lockstep": lambda: simulate_on_ray(cluster, LOCK_STEP),
        }
        simulate_on_ray(cluster, LOAD.changed({"learner.num_updates": 2}))  # imports and connections
        rounds = alternate(num_pairs, sides, say)
    slowest = min(LOAD.rates.values()) * LOAD.config.learner.prompts_per_update
    rates = [{name: outcome.samples_per_s for name, outcome in found.items()} for found in rounds]
    return Measurement(
        pairs={
            "slowest": [(found["asynchronous"], slowest) for found in rates],
            "lockstep": [(found["asynchronous"], found["lockstep"]) for found in rates],
        },
        notes={"trajectories_per_s": rates, "slowest_stage_per_s": slowest},
    )
