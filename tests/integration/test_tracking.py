"""A real run and its event files, and a run whose tracker fails."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from distill.config.tree import flatten
from distill.evaluation import load_evaluation
from distill.run.folder import RunFolder
from distill.run.metrics import read_events, read_metrics
from tests.event_files import rounded, scalars
from tests.integration.test_train import PLAIN, start, train, world

__all__ = ["world"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def recorded(run: Path, evaluations: dict[str, int]) -> dict[str, dict[int, float]]:
    """Every finite number in ``metrics.parquet`` and the evaluations (label -> update), by name and update."""
    found: dict[str, dict[int, float]] = {}
    for row in read_metrics(run).to_pylist():
        update = row.pop("update")
        for name, value in row.items():
            if value is not None and math.isfinite(value):
                found.setdefault(name, {})[update] = value
    for label, update in evaluations.items():
        for name, value in flatten(load_evaluation(RunFolder(run).evaluation(label)).to_dict()).items():
            if value is not None:
                found.setdefault(f"evaluation/{name}", {})[update] = value
    return found


def test_event_files_have_every_number_and_a_failing_tracker_ends_no_run(world: Path) -> None:
    run = train(world, "tracked", *PLAIN, "cluster.backend=in_process")
    found = scalars(run / "tensorboard")
    assert len(found) > 40
    assert found == rounded(recorded(run, {"before": 0, "step-1": 1, "after": 2}))

    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").touch()  # no folder can be made there
    process = start(world, "train", "--resume", str(run), "learner.num_updates=4")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    assert output.count("warning: tracker tensorboard has failed") == 1
    assert read_metrics(run)["update"].to_pylist() == [1, 2, 3, 4]
    (failed,) = [event for event in read_events(run) if event["event"] == "tracker_failed"]
    assert failed["tracker"] == "tensorboard"
