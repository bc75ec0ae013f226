"""Runs whose numbers stop being finite, from the command line to the run folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill.run.folder import RunFolder
from distill.run.metrics import read_events, read_metrics
from tests.integration.test_train import PLAIN, start, train_arguments
from tests.tiny import make_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


def test_run_that_diverges_keeps_the_rows_before_it(world: Path) -> None:
    """They are written to the file only every few seconds."""
    settings = [*PLAIN, "recipe=fkl", "cluster.backend=in_process", "learner.num_updates=9", "sft.enabled=false",
                "learner.learning_rate=1e30", "learner.warmup_fraction=0.5", "evaluation.every=0", "checkpoint.every=100"]  # fmt: skip
    process = start(world, *train_arguments(world, "diverged", *settings))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output[-3000:]
    failure = RunFolder(world / "diverged").read_failure()
    assert failure is not None and failure["code"] == "diverged", output[-3000:]
    assert read_metrics(world / "diverged")["update"].to_pylist()[:1] == [1]
    (file,) = (world / "diverged" / "nonfinite").iterdir()
    assert f"`distill replay-batch {file}`" in failure["remedy"]
    replayed = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "replay-batch", str(file)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert replayed.returncode == 1, replayed.stderr
    assert "\nthe first tensor that is not finite is the " in replayed.stdout


def test_skipped_updates_are_counted_over_a_resume_and_add_up(world: Path) -> None:
    """After the first update, whose rate ruins the student, every update is skipped; the limit is the run's."""
    run = world / "skips"
    settings = [*PLAIN, "recipe=fkl", "cluster.backend=in_process", "learner.num_updates=3", "sft.enabled=false", "learner.learning_rate=1e30",
                "learner.warmup_fraction=0", "learner.on_nonfinite=skip", "evaluation.every=0", "scoring.check=0", "checkpoint.every=1"]  # fmt: skip
    process = start(world, *train_arguments(world, "skips", *settings))
    output, _ = process.communicate(timeout=200)
    skipped = [event for event in read_events(run) if event["event"] == "update_skipped"]
    assert [event["update"] for event in skipped] == [2, 3], output[-3000:]
    assert read_metrics(run)["learner/num_nonfinite"].to_pylist() == [0, 1, 2]
    more = start(world, "train", "--resume", str(run), "learner.num_updates=9", "learner.max_nonfinite=3")
    output, _ = more.communicate(timeout=200)
    assert more.returncode == 1, output[-3000:]
    assert (
        "update 5, stage student" in output
        and "because learner.max_nonfinite=3 updates have been skipped" in output
    )
    audit = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "audit", str(run)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert audit.returncode == 0 and "4 updates, 2 starts" in audit.stdout, audit.stdout + audit.stderr
