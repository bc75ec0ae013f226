"""Pools of actors with real Ray and real engines: several replicas, at the same time, and in turns."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill.config.load import load_config
from distill.replay.draws import BatchPlan
from distill.run.metrics import read_events, read_metrics
from learner.process.checkpoint import Checkpoints
from tests.integration.test_train import (
    PLAIN,
    assert_nothing_shared,
    different_metrics,
    start,
    train,
    train_arguments,
    world,
)

__all__ = ["world"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TWO = ["rollout.replicas=2", "scoring.replicas=2"]


def check_ledger(run: Path, num_updates: int, max_policy_age: int) -> None:
    """Planned updates, ages within the bound, and every draw trained once."""
    metrics = read_metrics(run)
    assert metrics["update"].to_pylist() == list(range(1, num_updates + 1))
    assert max(metrics["policy/age_max"].to_pylist()) <= max_policy_age
    newest = Checkpoints(run / "checkpoints", keep=2).latest()
    assert newest is not None
    _, state = Checkpoints.load(newest)
    plan = BatchPlan.of(load_config(run / "config.yaml", (), None))
    assert state["ledger"]["student_trained"] == {"prefix": plan.student_through(num_updates), "extra": []}


def test_replicas_of_vllm_work_at_the_same_time(world: Path) -> None:
    run = train(world, "asynchronous", *TWO, "replay.max_policy_age=1", "learner.num_updates=6")
    check_ledger(run, 6, 1)
    summary = json.loads((run / "summary.json").read_text())
    names = {name.partition(".")[0] for name in summary["actors"]}
    assert names == {"rollout-0", "rollout-1", "teacher-0", "teacher-1", "learner"}
    assert all(
        counters["rollout/num_samples"] > 0
        for name, counters in summary["actors"].items()
        if name.startswith("rollout")
    )
    assert summary["tokens"]["rollout"] == sum(
        counters.get("rollout/num_tokens", 0) for counters in summary["actors"].values()
    )
    labels = [event["label"] for event in read_events(run) if event["event"] == "evaluated"]
    assert labels == ["before", *(f"step-{update}" for update in range(1, 6)), "after"]
    assert_nothing_shared(run)


def test_a_run_is_scaled_up_and_down_while_it_goes(world: Path) -> None:
    settings = [
        *PLAIN,
        "replay.max_policy_age=2",
        "learner.num_updates=300",
        "evaluation.every=0",
        "checkpoint.every=100",
    ]
    process = start(world, *train_arguments(world, "scaled", *settings))
    run = world / "scaled"
    try:
        until(lambda: (run / "metrics.parquet").exists() or process.poll() is not None)
        assert scale(run, "rollout=2", "scoring=2") == (0, "rollout 1 -> 2, scoring 1 -> 2\n")
        assert scale(run, "rollout=1") == (0, "rollout 2 -> 1\n")
        code, text = scale(run, "scoring=1000")
        assert code == 2
        assert text.startswith("distill: scoring.replicas=1000 must be <= ") and text.endswith("lower it\n")
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]
    check_ledger(run, 300, 2)
    summary = json.loads((run / "summary.json").read_text())
    assert sorted(summary["actors"]) == [
        "learner",
        "rollout-0.1000",
        "rollout-1.1001",
        "teacher-0.1000",
        "teacher-1.1001",
    ]
    code, text = scale(run, "rollout=2")
    assert (code, text) == (2, f"distill: run_dir={run} must be training; it has ended; start another run\n")
    assert_nothing_shared(run)


def test_replicas_in_lock_step_repeat_themselves(world: Path) -> None:
    settings = [*PLAIN, *TWO, "learner.num_updates=3", "cluster.backend=in_process", "learner.num_threads=1",
                "rollout.num_threads=1", "scoring.num_threads=1"]  # fmt: skip
    runs = [train(world, f"in-turns-{number}", *settings) for number in range(2)]
    assert different_metrics(*runs) == {}
    check_ledger(runs[0], 3, 0)


def test_a_pool_larger_than_the_machine_is_refused(world: Path) -> None:
    process = start(world, *train_arguments(world, "large", "rollout.replicas=1000"))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    line = output.splitlines()[-1]
    assert line.startswith("distill: rollout.replicas=1000 must be <= ") and line.endswith("; lower it")


def scale(run: Path, *pools: str) -> tuple[int, str]:
    """Run `distill scale`; returns its exit code and what it printed."""
    command = [sys.executable, "-m", "deploy.cli.main", "scale", str(run), *pools]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def until(condition: Any, timeout_s: float = 120.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
