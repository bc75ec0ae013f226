"""Predictions and advice come true: in runs of waiting engines on a real Ray, and for a run of a real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.benchmarks.simulated import RayOutcome, simulate_on_ray
from deploy.cluster.ray_cluster import RayCluster
from deploy.plan.load import Load, Service, waiting_config
from deploy.plan.simulate import simulate
from deploy.run.training.advice import Setup, advise
from distill.config import ClusterConfig
from distill.run.metrics import read_metrics
from tests.integration.test_train import PLAIN, start, train, train_arguments, world

__all__ = ["world"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WITHIN = 0.15
LOAD = Load(
    config=waiting_config(
        num_rollouts=4, num_teachers=4, prompts_per_update=16, num_updates=12, max_policy_age=3
    ),
    rollout=Service(0.8),
    teacher=Service(0.4),
    update=Service(0.64 / 16),
    push_s=0.08,
)


@pytest.fixture(scope="module")
def cluster(no_tokens: None) -> Iterator[RayCluster]:
    with RayCluster(ClusterConfig(address="local"), "bbbbbbbd") as cluster:
        simulate_on_ray(cluster, LOAD.changed({"learner.num_updates": 2}))  # imports and connections
        yield cluster


@pytest.fixture(scope="module")
def four(cluster: RayCluster) -> Load:
    """The load as a run with four engines of each kind measures it."""
    return as_measured(LOAD, simulate_on_ray(cluster, LOAD))


def as_measured(load: Load, outcome: RayOutcome) -> Load:
    """The load with the services that the run's own clocks tell."""
    row, config = outcome.row, load.config

    def busy_s(stage: str, replicas: int) -> float:
        """Of one engine, for one text."""
        return row[f"{stage}/busy_share"] * replicas / outcome.samples_per_s

    return Load(
        config=config,
        rollout=Service(busy_s("rollout", config.rollout.replicas)),
        teacher=Service(busy_s("teacher", config.scoring.replicas)),
        update=Service(busy_s("learner", 1)),
        push_s=row["timing/push_s"],
    )


@pytest.mark.parametrize(
    "changes",
    [{"rollout.replicas": 16}, {"rollout.replicas": 16, "scoring.replicas": 16, "replay.max_policy_age": 4}],
    ids=str,
)
def test_four_measured_engines_predict_sixteen(cluster: RayCluster, four: Load, changes: dict[str, int]):
    predicted = simulate(four.changed(changes)).samples_per_s
    real = simulate_on_ray(cluster, LOAD.changed(changes)).samples_per_s
    assert predicted == pytest.approx(real, rel=WITHIN)


def test_an_advice_brings_what_it_predicts(cluster: RayCluster):
    """The other kinds are followed in simulated time, in tests/unit/training/test_advice.py."""
    load = LOAD.changed({"rollout.replicas": 16, "scoring.replicas": 2})
    before = simulate_on_ray(cluster, load)
    advice = advise(before.row, Setup(max_policy_age=load.config.replay.max_policy_age))
    assert advice is not None and advice.changes
    after = simulate_on_ray(cluster, load.changed(advice.changes))
    assert after.samples_per_s / before.samples_per_s == pytest.approx(advice.gain, rel=1 / 3)


def test_a_lock_step_run_is_predicted_from_its_parts(world: Path):
    """Of a real model, by the command; and it says what is wrong with another teacher."""
    settings = [*PLAIN, "learner.num_updates=12", "evaluation.every=0", "checkpoint.every=12"]
    run = train(world, "measured", *settings)
    _, *plan = train_arguments(world, "planned", *settings)
    process = start(world, "plan", *plan, "--measured", str(run), "--devices", "4", "--json")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    found = json.loads(output[output.index("{\n") :])
    seconds = read_metrics(run)["timing/update_s"].to_pylist()[2:]
    predicted_s = 1 / found["as_configured"]["updates_per_s"]
    assert predicted_s == pytest.approx(sum(seconds) / len(seconds), rel=WITHIN)
    assert [split["num_devices"] for split in found["splits"]] == [3, 4]
    assert found["memory_bytes"]["learner"] > 0

    other = start(world, "plan", *plan, "rollout.max_new_tokens=3", "--measured", str(run))
    output, _ = other.communicate(timeout=300)
    assert other.returncode == 2
    assert "rollout.max_new_tokens=3 must be as in the run that was measured" in output
