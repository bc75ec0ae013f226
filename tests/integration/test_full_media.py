"""The real program on file systems that are really full: it goes on elsewhere, waits, or ends and can be resumed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.files import is_temporary
from distill.run.folder import RunFolder
from distill.run.ledger_file import LedgerReader
from distill.run.metrics import read_events, read_metrics
from learner.process.checkpoint import Checkpoints
from tests.integration.test_train import (
    PLAIN,
    assert_nothing_shared,
    assert_same_numbers,
    events,
    start,
    steps,
    train,
    train_arguments,
    wait_for,
    world,
)
from tests.media import fill, mounted

__all__ = ["world"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [*PLAIN, "cluster.backend=in_process", "learner.num_updates=12", "evaluation.every=4", "learner.num_threads=1",
            "rollout.num_threads=1", "scoring.num_threads=1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run that nothing has disturbed."""
    return train(world, "whole", *SETTINGS)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", 64 << 20) as folder:
        yield folder


def training(world: Path, run: Path, *settings: str) -> subprocess.Popen[str]:
    return start(world, *train_arguments(world, "unused", *SETTINGS, f"run_dir={run}", *settings))


def assert_whole(run: Path) -> None:
    """Nothing in the folder is torn, and no file of an unfinished write is left."""
    for step in steps(run):
        Checkpoints.load(run / "checkpoints" / f"step-{step}")
    assert not [path for path in run.rglob("*") if is_temporary(path.name)]
    reader = LedgerReader(run / "ledger.jsonl")
    updates = [entry.update for entry in reader if hasattr(entry, "update")]
    assert (max(updates) >= max(steps(run)), reader.num_broken) == (True, 0)
    assert read_metrics(run).num_rows >= max(steps(run))
    lines = (run / "events.jsonl").read_text().splitlines()
    assert len(lines) == len(list(read_events(run)))


def test_a_run_on_a_full_disk_ends_and_resumes_with_the_same_numbers(
    world: Path, whole: Path, disk: Path
) -> None:
    run = disk / "run"
    process = training(world, run, "checkpoint.wait_for_room_s=3")
    wait_for(lambda: len(steps(run)) >= 2, process)
    filling = fill(disk)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output[-3000:]
    [warning] = [line for line in output.splitlines() if "the run waits for room" in line]
    assert "warning: " in warning and f"free space for {run}/" in warning
    [failed] = [line for line in output.splitlines() if "the run failed" in line]
    assert f"free space for {run}/" in failed and failed.endswith(
        "free some there or lower checkpoint.keep; then resume the run"
    )
    assert "Traceback" not in output
    assert steps(run) and max(steps(run)) < 12
    assert_whole(run)
    assert_nothing_shared(run)

    filling.unlink()
    resumed = start(world, "train", "--resume", str(run))
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output[-3000:]
    assert_whole(run)
    assert_same_numbers(run, whole)
    assert not (run / "failure.json").exists()


def test_a_run_that_waits_goes_on_when_there_is_room(world: Path, whole: Path, disk: Path) -> None:
    run = disk / "run"
    process = training(world, run, "checkpoint.wait_for_room_s=120")
    wait_for(lambda: len(steps(run)) >= 2, process)
    filling = fill(disk)
    assert process.stdout is not None
    for line in process.stdout:
        if "the run waits for room" in line:
            break
    filling.unlink()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert "there is room again" in output
    assert "waiting_for_room" in events(run) and "room_found" in events(run)
    assert_whole(run)
    assert_same_numbers(run, whole)


def test_a_run_in_a_container_with_little_shared_memory_uses_the_disk(world: Path, whole: Path) -> None:
    """Rows and weights are read from there, and are the same."""
    run = world / "little-memory"
    namespace = ["unshare", "--mount", "--propagation", "private"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no namespace of mounts can be made here")
    arguments = train_arguments(world, run.name, *SETTINGS)
    process = start(
        world,
        *arguments,
        within=[*namespace, "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "-"],
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    for what in ("rows", "weights"):
        assert f"/dev/shm has no room for all {what}, so some go to the run folder" in output
    assert "warning: needs " in output and "so weights and rows go to the run folder" in output
    assert events(run).count("shared_memory_full") == 2
    assert not (run / "replay").exists()
    assert_same_numbers(run, whole)
    assert RunFolder(run).read_summary() is not None
