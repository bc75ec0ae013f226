"""The tests' tiny models, made once per file, and what the preflight says about other ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.cli.main import main
from deploy.run.preflight import Preflight
from distill.errors import ConfigError
from tests.tiny import make_world, tiny_config

TRANSFORMERS = ("rollout.engine=transformers", "scoring.engine=transformers")
Train = Callable[..., list[str]]
"""Runs `distill train` up to its stages; returns the lines that it prints."""
Doctor = Callable[..., Preflight]
"""Makes the checks with a checkpoint's folder as ``role`` and with overrides."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, rows and a configuration file."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, with a cache; its folder ``work`` is the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Train:
    """A function that runs `distill train` up to its stages, and returns the lines that it prints.

    It expects the stages to be reached, or with ``refused`` one line of complaint before that.
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.run.train._run_stages", stop)

    def run(*arguments: str, refused: bool = False) -> list[str]:
        code = main(["train", *arguments])
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert code == (2 if refused else 130), lines
        assert not refused or len(lines) == 1, lines
        return [*captured.out.splitlines(), *lines]

    return run


@pytest.fixture
def doctor(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))

    def run(model: Path | str | None = None, *overrides: str, role: str = "teacher") -> Preflight:
        settings = [*TRANSFORMERS, f"run_dir={tmp_path}/run"]
        if model is not None:
            settings.append(f"{role}.model={model}")
        if role == "student":
            settings += ["student.init.from=null", "student.init.num_layers=null"]
        if role == "proxy":
            settings.append("recipe=ammd_blackbox")
        preflight = Preflight(tiny_config(world, *settings, *overrides))
        preflight.run()
        return preflight

    return run


def fault(preflight: Preflight) -> ConfigError:
    """The failure of a preflight, which has one line."""
    assert preflight.failure is not None, [check.text for check in preflight.checks]
    assert "\n" not in str(preflight.failure)
    assert preflight.failure.remedy
    return preflight.failure


def passes(preflight: Preflight) -> bool:
    """Whether no check failed; raises the failure otherwise, so that a test shows it."""
    preflight.require()
    return all(check.status != "fail" for check in preflight.checks)
