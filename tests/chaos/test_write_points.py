"""A process is killed at every durable write of a run, one after the other, and the run still comes to the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.files import is_temporary
from tests.chaos.victims import assert_audit_is_clean
from tests.integration.test_train import (
    PLAIN,
    assert_nothing_shared,
    assert_same_numbers,
    train,
    train_arguments,
    world,
)
from tests.tiny import save_tiny_llama

__all__ = ["world"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NAMED = {
    "config.yaml",
    "run.json",
    "settings.json",
    "data/train.parquet",
    "student-init",
    "sft",
    "policy_version.json",
    "metrics.parquet",
    "evaluations/step-*.parquet",
    "best",
    "checkpoints/step-*",
    "student",
    "summary.json",
    "report.html",
}
"""Writes within the run folder that have to be among those at which the process was killed."""


def test_a_run_that_is_killed_at_every_write_comes_to_the_same_end(world: Path) -> None:
    """With a teacher that gives only text, because this run also writes a proxy."""
    proxy = save_tiny_llama(world / "proxy", seed=5)
    settings = [*PLAIN, "recipe=ammd_blackbox", f"proxy.model={proxy}", "proxy.num_updates=2", "proxy.rows_per_update=4",
                "learner.num_updates=3", "cluster.backend=in_process"]  # fmt: skip
    run, cache = world / "killed", world / "cache-of-killed"
    _, config, *overrides = train_arguments(world, "killed", *settings)
    others = [each for each in overrides if not each.startswith("run_dir=")]
    killed = subprocess.run(
        [sys.executable, "-m", "tests.chaos.write_points", str(run), config, *others],
        env=os.environ | {"DISTILL_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=1300,
    )
    assert killed.returncode == 0, killed.stdout[-4000:] + killed.stderr[-4000:]
    points = [tuple(point) for point in json.loads(killed.stdout.splitlines()[-1])]
    names = {name for name, _ in points}
    assert set(points) == {(name, moment) for name in names for moment in ("before", "after")}
    assert {f"killed/{name}" for name in NAMED} <= names
    for kind in ("corpora", "proxies"):
        assert any(kind in name for name in names), sorted(names)
    assert "Traceback" not in killed.stdout + killed.stderr
    assert_same_numbers(run, train(world, "whole", *settings))
    assert_audit_is_clean(run, 3)
    assert_nothing_shared(run)
    left = [path.name for path in run.rglob("*") if is_temporary(path.name)]
    assert all(name.startswith(".report.html.") for name in left), left  # the report of a run that has ended
