"""TensorBoard's own reader finds every number of a run in its event files."""

from __future__ import annotations

from pathlib import Path

from distill.config import RunConfig, TrackingConfig
from tests.event_files import rounded, scalars, texts
from tests.unit.tracking.builders import (
    expected_numbers,
    interrupted_and_resumed,
    new_run,
    record_updates,
    recording,
    wait_until,
)

CONFIG = RunConfig()


def test_every_column_and_evaluation_is_there_and_a_resumed_run_supersedes_what_it_repeats(
    tmp_path: Path,
) -> None:
    run = interrupted_and_resumed(tmp_path / "run", CONFIG)
    folder, expected = run.path / "tensorboard", expected_numbers(run)
    assert set(expected["learner/loss"]) == set(range(1, 8))
    assert set(expected["policy/student_text.tv"]) == {1, 3, 4, 5, 6, 7}
    assert scalars(folder) == rounded(expected)
    # TensorBoard drops the superseded numbers, but not the texts.
    assert texts(folder, "alarm") == [(5, "superseded"), (7, "the critic is too weak")]
    settings = texts(folder, "settings")
    assert [update for update, _ in settings] == [0, 3]
    assert "| learner.num_updates | `20` |" in settings[0][1]
    assert len(list(folder.iterdir())) == 2


def test_a_run_that_starts_again_from_nothing_supersedes_all(tmp_path: Path) -> None:
    """It had no checkpoint when it died, and evaluates again before the first update."""
    run = new_run(tmp_path / "run")
    with recording(run, CONFIG, 0) as (recorder, _):
        record_updates(recorder, range(1, 3), salt=9.0)
    run.create("", "fingerprint")
    with recording(run, CONFIG, 0) as (recorder, _):
        record_updates(recorder, range(1, 2))
    found = scalars(run.path / "tensorboard")
    assert found["learner/loss"] == {1: 0.25}
    assert set(found["evaluation/teacher_text.tv"]) == {0}


def test_the_files_can_be_read_while_the_run_trains(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with recording(run, CONFIG, 0) as (recorder, trackers):
        record_updates(recorder, range(1, 2))
        found: list[dict[str, dict[int, float]]] = []
        (thread,) = trackers._threads
        thread.offer(lambda _: found.append(scalars(run.path / "tensorboard")))
        wait_until(lambda: bool(found))
    assert found[0]["learner/loss"] == {1: 0.25}


def test_nothing_is_written_without_trackers(tmp_path: Path) -> None:
    run = interrupted_and_resumed(tmp_path / "run", RunConfig(tracking=TrackingConfig(to=[])))
    assert not (run.path / "tensorboard").exists()
