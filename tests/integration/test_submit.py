"""Runs as jobs of a real Ray head, and every command of docs/cluster.md.

The head's Python does not find this project, so each job uses what was uploaded.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.submit.archive import PACKAGES
from distill.run.folder import RunFolder
from tests.integration.ray_head import ROOT, RayHead
from tests.tiny import make_world, tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

RUN = "/shared/my"
"""The run of the page's commands."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user: a configuration with relative paths, the data and the teacher, and nothing of this project."""
    folder = tmp_path_factory.mktemp("project")
    make_world(folder)
    tree: dict[str, object] = {"recipe": "ammd"}
    settings = [text for text in tiny_overrides(folder) if not text.startswith("run_dir=")]
    settings += ["rollout.engine=transformers", "scoring.engine=transformers"]
    for text in settings:
        name, _, value = text.partition("=")
        *sections, last = name.split(".")
        place: dict = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value.replace(f"{folder}/", ""))
    (folder / "my.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    head = RayHead(tmp_path_factory.mktemp("cache"), token=True)
    yield head
    head.stop()


def start(arguments: list[str], cwd: Path, head: RayHead) -> subprocess.Popen[str]:
    """Start a command as a user does, in an environment that has this project."""
    program, *rest = arguments
    if program == "distill":
        rest = ["-m", "deploy.cli", *rest]
        program = sys.executable
    elif program == "ray":
        program = str(Path(sys.executable).parent / "ray")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "DISTILL_CACHE": head.environment["DISTILL_CACHE"],
        **head.access,
    }
    return subprocess.Popen(
        [program, *rest],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(arguments: list[str], cwd: Path, head: RayHead, code: int = 0) -> str:
    process = start(arguments, cwd, head)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == code, output[-4000:]
    return output


def documented(program: str, word: str, head: RayHead, run: Path, job: str = "") -> list[str]:
    """The one command of the page with these words, for this head and run."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    lines = re.findall(rf"^{program} {word}.*$", page, re.MULTILINE)
    lines = [line for line in lines if ("--resume" in line) == (word == "submit --resume")]
    assert len(lines) == 1, (program, word, lines)
    line = lines[0].replace("http://HEAD:8265", head.dashboard).replace("HEAD:6379", head.address)
    return shlex.split(line.replace(RUN, str(run)).replace("JOB", job))


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not (RunFolder(run).exists and RunFolder(run).steps):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_every_command_of_the_page_is_run_here():
    page = (ROOT / "docs" / "cluster.md").read_text()
    blocks = "\n".join(re.findall(r"```sh[^\n]*\n(.*?)```", page, re.DOTALL))
    commands = [line for line in blocks.splitlines() if line and not line.startswith("export")]
    words = [" ".join(shlex.split(line)[:3]) for line in commands]
    assert words == [
        "ray get-auth-token --generate",
        "ray start --head",
        "distill submit my.yaml",
        "distill submit --resume",
        "ray job submit",
        "ray job logs",
        "ray job stop",
        "distill doctor my.yaml",
        "distill train my.yaml",
    ]


def test_a_submitted_run_is_followed_to_its_end(project: Path, head: RayHead, tmp_path: Path):
    run = tmp_path / "run"
    output = finish(documented("distill", "submit my.yaml", head, run), project, head)
    assert (run / "summary.json").exists()
    assert "Traceback" not in output
    for text in ("submitted raysubmit_", "ray job stop --address", f"new run {run}", "warm start: done"):
        assert text in output, output
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["data"]["path"], config["teacher"]["model"]) == ("rows.jsonl", "teacher")
    # A second job does nothing but see that the run is finished, in another copy of the folder.
    (project / "notes.txt").write_text("another upload")
    output = finish(documented("distill", "submit --resume", head, run), project, head)
    assert "is finished (2 updates); nothing to do" in output


def test_a_run_that_is_wrong_on_the_cluster_ends_with_2(project: Path, head: RayHead, tmp_path: Path):
    command = documented("distill", "submit my.yaml", head, tmp_path / "run")
    output = finish([*command, "teacher.model=/no/such/folder"], project, head, code=2)
    assert "distill: teacher.model=/no/such/folder must" in output
    assert "Traceback" not in output and not (tmp_path / "run").exists()


def test_a_run_that_wants_more_than_the_node_has_is_refused(project: Path, head: RayHead, tmp_path: Path):
    command = documented("distill", "submit my.yaml", head, tmp_path / "run")
    output = finish([*command, "rollout.num_threads=9"], project, head, code=2)
    assert f"CPUs of the Ray node {head.host}=2 must be >= 9" in output
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_is_resumed(project: Path, head: RayHead, tmp_path: Path):
    run = tmp_path / "run"
    # Enough of them that some are left when Ray's command, which takes seconds to start, stops the job.
    longer = ["learner.num_updates=60", "checkpoint.every=1", "evaluation.every=0"]
    following = start([*documented("distill", "submit my.yaml", head, run), *longer], project, head)
    wait_for_checkpoint(run, following)
    assert following.stdout is not None
    job = re.match(r"submitted (\S+) to ", following.stdout.readline())
    assert job is not None
    finish(documented("ray", "job stop", head, run, job[1]), project, head)
    output, _ = following.communicate(timeout=60)
    assert following.returncode == 130, output
    assert not (run / "summary.json").exists()
    logs = finish(documented("ray", "job logs", head, run, job[1]), project, head)
    assert f"new run {run}" in logs

    output = finish(documented("distill", "submit --resume", head, run), project, head)
    assert "resumed from the checkpoint after update" in output
    assert json.loads((run / "summary.json").read_text())["updates"] == 60


def test_rays_own_command_runs_a_folder_that_contains_the_project(
    project: Path, head: RayHead, tmp_path: Path
):
    folder, run = tmp_path / "checkout", tmp_path / "run"
    shutil.copytree(project, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    output = finish(documented("ray", "job submit", head, run), folder, head)
    assert (run / "summary.json").exists(), output
    command = [word if "run_dir=" not in word else "run_dir=runs/my" for word in documented("ray", "job submit", head, run)]  # fmt: skip
    output = finish(command, folder, head, code=1)  # Ray's command knows no other code
    assert "run_dir=runs/my must be an absolute path on the cluster" in output


def test_a_run_connects_from_the_node(project: Path, head: RayHead, tmp_path: Path):
    run = [f"run_dir={tmp_path}/run"]
    output = finish([*documented("distill", "doctor", head, tmp_path), *run], project, head)
    assert f"the actors run on node {head.host} of the Ray cluster at {head.address}: learner" in output
    output = finish([*documented("distill", "train", head, tmp_path), *run], project, head)
    assert (tmp_path / "run" / "summary.json").exists()
    assert "Traceback" not in output


def test_a_user_without_the_token_is_refused(
    project: Path, head: RayHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both where the run starts and where it is submitted."""
    monkeypatch.setattr(RayHead, "access", {"RAY_AUTH_MODE": "disabled"})
    for command in (documented("distill", "train", head, tmp_path), documented("distill", "submit my.yaml", head, tmp_path)):  # fmt: skip
        output = finish([*command, f"run_dir={tmp_path}/run"], project, head, code=2)
        assert (
            "must accept this user's token, or need none; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"
            in output
        )


def test_what_is_no_head_is_refused_soon(project: Path, head: RayHead, tmp_path: Path):
    """The job server where a head is expected, and the reverse."""
    began = time.monotonic()
    wrong = head.dashboard.removeprefix("http://")
    output = finish(["distill", "train", "my.yaml", f"run_dir={tmp_path}/run", f"cluster.address={wrong}"], project, head, code=2)  # fmt: skip
    assert f"cluster.address={wrong} must be the address of a Ray head (something listens there" in output
    command = [
        "distill",
        "submit",
        "my.yaml",
        f"run_dir={tmp_path}/run",
        "--address",
        f"http://{head.address}",
    ]
    output = finish(command, project, head, code=2)
    assert "something listens there, but it is not a Ray job server" in output
    assert time.monotonic() - began < 90
