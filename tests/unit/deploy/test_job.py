"""Paths and versions in a process that Ray started for a submitted job."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli.main import main
from deploy.job import JOB_VARIABLE, VERSIONS_VARIABLE, in_uploaded_folder, uploaded_path_or_name
from deploy.run.settings import config_to_resume, load_run
from deploy.version import versions
from distill.errors import ConfigError

ROOT = Path(__file__).parents[3]
SETTINGS = "recipe: ammd\nstudent: {init: {from: teacher, num_layers: 2}}\n"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job, with an uploaded configuration and data."""
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0"
    folder.mkdir(parents=True)
    (folder / "my.yaml").write_text(SETTINGS)
    (folder / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    return folder


def test_a_job_is_known_by_its_folder_and_its_variable(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert in_uploaded_folder()
    monkeypatch.delenv(JOB_VARIABLE)
    assert not in_uploaded_folder()
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.chdir(tmp_path)
    assert not in_uploaded_folder()


def test_paths_of_uploaded_files_stay_relative_and_all_others_are_absolute(job: Path):
    config = load_run(
        "my.yaml", ["run_dir=/shared/run", "data.path=./rows.jsonl", "teacher.model=/m/teacher"]
    )
    assert (config.run_dir, config.data.path, config.teacher.model) == (
        "/shared/run",
        "rows.jsonl",
        "/m/teacher",
    )


def test_what_a_run_leaves_must_outlast_the_job(job: Path):
    with pytest.raises(ConfigError, match=r"^run_dir=runs/x must be an absolute path on the cluster"):
        load_run("my.yaml", ["run_dir=runs/x"])
    with pytest.raises(ConfigError, match=r"^--resume=runs/x must be an absolute path on the cluster"):
        config_to_resume("runs/x")


@pytest.mark.parametrize("text", ["none.jsonl", "./none", "../rows.jsonl", ".."])
def test_a_relative_path_that_was_not_uploaded_is_refused(job: Path, text: str):
    (job.parent / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match="must be in the folder that is uploaded with the job; submit from"):
        uploaded_path_or_name(text, (), "data.path")


@pytest.mark.parametrize("text", ["owner/name", "known", "rows.jsonl", "*.jsonl"])
def test_names_and_patterns_stay(job: Path, text: str):
    assert uploaded_path_or_name(text, ("known",), "data.path") == text


def test_other_versions_than_those_of_the_submitter_are_refused(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    mine = versions()
    monkeypatch.setenv(VERSIONS_VARIABLE, json.dumps(mine | {"Python": "3.9.1"}))
    assert main(["train", "my.yaml"]) == 2
    line = capsys.readouterr().err
    assert f"Python of `distill submit`=3.9.1 must be {mine['Python']}, as on the node of the cluster" in line
    monkeypatch.setenv(VERSIONS_VARIABLE, json.dumps(mine | {"distill": None}))
    assert main(["train", "my.yaml", "run_dir=runs/x"]) == 2
    assert "run_dir=runs/x" in capsys.readouterr().err


def test_a_python_without_the_packages_is_named(tmp_path: Path):
    """`-S` hides the environment's packages, as a system's Python does."""
    command = [sys.executable, "-S", "-m", "deploy.cli", "train", "x.yaml"]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert sys.executable in line and "must have the package" in line
