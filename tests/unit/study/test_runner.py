"""What a study's runs are named by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deploy.study import runner
from deploy.study.spec import StudySpec, Tuning


def test_the_methods_hash_sees_its_code(monkeypatch: pytest.MonkeyPatch):
    whole = runner.method_hash()
    assert whole == runner.method_hash()
    monkeypatch.setattr(runner, "METHOD_CODE", runner.METHOD_CODE[:-1])
    assert runner.method_hash() != whole


def job(run_dir: Path, rate: float, *, failure: str) -> runner.Job:
    run_dir.mkdir()
    (run_dir / "failure.txt").write_text(failure)
    return runner.Job("kd", 100, {"learner.learning_rate": rate}, True, run_dir / "c.json", run_dir)


def test_a_tuning_run_that_diverged_is_done_and_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    diverged = job(tmp_path / "a", 1.0, failure="FloatingPointError: the student's loss is nan")
    broken = job(tmp_path / "b", 0.1, failure="OSError: the disk is full")
    assert runner._is_done(diverged) and not runner._is_done(broken)
    assert not runner._is_done(replace(diverged, tuning=False)), "a reported run has to end"
    monkeypatch.setattr(runner, "final", lambda run_dir, metric: 0.3)
    tuning = Tuning({"learner.learning_rate": [1.0, 0.1]}, (100,), {}, "teacher_text.tv")
    spec = StudySpec("s", "t", {"kd": {}}, (0,), "kd", ("teacher_text.tv",), tuning=tuning)
    study = runner.Study(spec, tmp_path, say=lambda _: None)
    assert study._choose("kd", [diverged, broken]) == {"learner.learning_rate": 0.1}
    with pytest.raises(runner.StudyUnfinished, match="kd diverges at every point"):
        study._choose("kd", [diverged, replace(diverged, tuned=broken.tuned)])
