"""When a study stops, and how runs that diverged count."""

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
        match=rf"^study s: method hash=other must be {study.code}, as at the start; start the study again, from a git worktree",
    ):
        study._require_same_code()


def test_all_runs_of_a_folder_use_the_same_models(tmp_path: Path):
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
        match=rf"^task tiny-wiki={identity(made)} must be {before}, which the runs in .* used; name another --out, because",
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


def test_a_diverged_run_is_done_and_scores_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    diverged = job(tmp_path / "a", 1.0, failure=DIVERGED)
    broken = job(tmp_path / "b", 0.1, failure=OSError("the disk is full"))
    assert diverged.is_done and not broken.is_done
    monkeypatch.setattr(runner, "final_value", lambda run_dir, metric: 0.3)
    study = runner.Study(SPEC, tmp_path, say=lambda _: None)
    assert study._choose("kd", [diverged, broken]) == {"learner.learning_rate": 0.1}
    with pytest.raises(
        runner.StudyUnfinished,
        match=r"^study s: kd must finish without diverging at one point of the grid at least; lower the learning rates of tuning\.grid$",
    ):
        study._choose("kd", [diverged, replace(diverged, tuned=broken.tuned)])


def test_a_diverged_reported_run_is_listed_and_excluded(tmp_path: Path):
    diverged = job(tmp_path / "a", 1.0, failure=DIVERGED)
    study = runner.Study(replace(SPEC, tuning=None), tmp_path, say=lambda _: None)
    results = study._results([diverged], {}, {})
    assert results["diverged"] == [{"recipe": "kd", "seed": 100, "run": "a"}]
    assert results["runs"] == results["differences"] == []
    with pytest.raises(
        runner.StudyUnfinished,
        match=r"^study s: baseline=kd must have a run that finished without diverging; run the study, or name another",
    ):
        study._write_results([diverged], {}, {})
