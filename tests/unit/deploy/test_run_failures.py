"""A run that fails after it has taken its folder: two lines for the user, and the error in the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.cli.main import main
from distill.errors import ConfigError, DistillError, Diverged
from distill.run.folder import RunFolder
from tests.tiny import tiny_overrides

FailingRun = Callable[..., list[str]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def failing_run(
    world: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> FailingRun:
    """A function that trains with stages that raise an error, and returns the lines on stderr."""

    def run(error: Exception, code: int, before: Callable[[], None] = lambda: None) -> list[str]:
        def fail(*_: object) -> None:
            before()
            raise error

        monkeypatch.setattr("deploy.run.train._run_stages", fail)
        assert main(["train", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={run_dir}"]) == code
        return capsys.readouterr().err.strip().splitlines()

    return run


def test_error_of_the_system_is_kept(failing_run: FailingRun, run_dir: Path) -> None:
    failed, _ = failing_run(OSError(28, "No space left on device"), 1)
    assert "the run failed: OSError: [Errno 28] No space left on device" in failed
    assert "Traceback" in (run_dir / "failure.txt").read_text()
    assert RunFolder(run_dir).read_failure() == {
        "code": "unexpected",
        "message": "OSError: [Errno 28] No space left on device",
    }


@pytest.mark.parametrize("kind", [Diverged, ConfigError])
def test_error_of_an_actor_is_kept_as_data(
    failing_run: FailingRun, run_dir: Path, kind: type[DistillError]
) -> None:
    error = kind("the student's loss", float("nan"), "be finite", "lower the rate").within("learner")
    failed, where = failing_run(error, kind.exit_code)
    assert failed.endswith("the run failed: learner: the student's loss=nan must be finite; lower the rate")
    assert where.endswith(
        f"traceback in {run_dir}/failure.txt; resume with: distill train --resume {run_dir}"
    )
    assert RunFolder(run_dir).read_failure() == error.parts()
    assert kind.__name__ in (run_dir / "failure.txt").read_text()


def test_full_disk_does_not_hide_the_failure(
    failing_run: FailingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    failed, where = failing_run(
        Diverged("the loss", float("nan"), "be finite"),
        1,
        before=lambda: monkeypatch.setattr("distill.run.folder.write_json", full),
    )
    assert "the loss=nan must be finite" in failed
    assert "could not be written" in where and "No space left" in where


def test_failed_preparation_is_kept(
    world: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("student.init.num_layers", 1, "be another number")

    monkeypatch.setattr("deploy.run.train.prepare", fail)
    assert main(["train", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={run_dir}"]) == 2
    failure = RunFolder(run_dir).read_failure()
    assert failure is not None and failure["message"] in capsys.readouterr().err
