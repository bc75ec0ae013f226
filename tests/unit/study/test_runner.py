"""What a study's runs are named by, which of them count, and what stops it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deploy import PRESETS
from deploy.study import runner
from deploy.study.jobs import Job
from deploy.study.spec import StudySpec, Tuning
from deploy.study.tasks.registry import identity
from distill.config.load import load_config
from distill.errors import ConfigError, Diverged
from distill.run.folder import RunFolder

TUNING = Tuning({"learner.learning_rate": [1.0, 0.1]}, (100,), {}, "teacher_text.tv")
SPEC = StudySpec("s", "tiny-wiki", {"kd": {}}, (0,), "kd", ("teacher_text.tv",), tuning=TUNING)


def test_changed_code_stops_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = runner.Study(SPEC, tmp_path, say=lambda _: None)
    study._require_same_code()
    monkeypatch.setattr(runner, "method_hash", lambda: "other")
    with pytest.raises(
        runner.StudyUnfinished,
        match=rf"^study s: method hash=other must be {study.code}, as at the start; leave the code alone",
    ):
        study._require_same_code()


def test_a_folder_holds_runs_on_one_set_of_models(tmp_path: Path):
    made = tmp_path / "task"
    made.mkdir()
    (made / "prompts.jsonl").write_text("{}")
    study = runner.Study(SPEC, tmp_path / "out", say=lambda _: None)
    study.task = replace(study.task, folder=lambda: made)
    study._require_same_task()
    study._require_same_task()
    before = identity(made)
    (made / "prompts.jsonl").write_text("{} ")
    with pytest.raises(
        ConfigError,
        match=rf"^task tiny-wiki={identity(made)} must be what the runs in .* had, {before}; .*name another --out$",
    ):
        study._require_same_task()


DIVERGED = Diverged("the student's loss", float("nan"), "be finite").within("learner")


def job(run_dir: Path, rate: float, *, failure: Exception) -> Job:
    run_dir.mkdir()
    RunFolder(run_dir).write_failure(failure)
    (run_dir.parent / "empty.yaml").write_text("{}")
    overrides = ["recipe=kd", "teacher.model=t", "student.model=s", "data.path=d"]
    config = load_config(run_dir.parent / "empty.yaml", overrides, PRESETS)
    return Job("kd", 100, {"learner.learning_rate": rate}, True, (), config, run_dir)


def test_a_run_that_diverged_is_done_and_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    diverged = job(tmp_path / "a", 1.0, failure=DIVERGED)
    broken = job(tmp_path / "b", 0.1, failure=OSError("the disk is full"))
    assert diverged.is_done and not broken.is_done
    monkeypatch.setattr(runner, "final", lambda run_dir, metric: 0.3)
    study = runner.Study(SPEC, tmp_path, say=lambda _: None)
    assert study._choose("kd", [diverged, broken]) == {"learner.learning_rate": 0.1}
    with pytest.raises(
        runner.StudyUnfinished,
        match=r"^study s: kd must end well at one point .* diverges at every point; lower the learning rates of tuning\.grid$",
    ):
        study._choose("kd", [diverged, replace(diverged, tuned=broken.tuned)])


def test_a_reported_run_that_diverged_is_named_and_counts_nowhere(tmp_path: Path):
    diverged = job(tmp_path / "a", 1.0, failure=DIVERGED)
    study = runner.Study(replace(SPEC, tuning=None), tmp_path, say=lambda _: None)
    results = study._results([diverged], {}, {})
    assert results["diverged"] == [{"recipe": "kd", "seed": 100, "run": "a"}]
    assert results["runs"] == results["differences"] == []
    with pytest.raises(
        runner.StudyUnfinished,
        match=r"^study s: baseline=kd must have a run that ended well; run the study, or name another",
    ):
        study._write_results([diverged], {}, {})
