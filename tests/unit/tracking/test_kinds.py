"""Which trackers there are, and what they need."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.run.tracking.kinds import KINDS, require_installed
from distill.config import RunConfig, TrackingConfig
from distill.config.runtime import TRACKERS
from distill.errors import ConfigError


def tracking(*names: str) -> RunConfig:
    return RunConfig(tracking=TrackingConfig(to=list(names)))


def test_every_tracker_that_a_configuration_can_name_exists() -> None:
    assert tuple(KINDS) == TRACKERS


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(KINDS[name].package, monkeypatch)
    require_installed(tracking())
    with pytest.raises(ConfigError) as caught:
        require_installed(tracking(name))
    package = KINDS[name].package
    assert str(caught.value) == (
        f"tracking.to={name} must be installed (there is no package {package}); "
        f"run `pip install {package}`, or take {name} out of the list"
    )


def test_a_folder_with_the_name_of_a_package_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B makes a folder ``wandb`` in the working directory, from which Python imports."""
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    kinds: dict[str, Any] = {"wandb": type(KINDS["wandb"])("a_tracker", KINDS["wandb"].open)}
    monkeypatch.setattr("deploy.run.tracking.kinds.KINDS", kinds)
    with pytest.raises(ConfigError):
        require_installed(tracking("wandb"))
    (tmp_path / "a_tracker" / "__init__.py").touch()
    require_installed(tracking("wandb"))


def test_the_trackers_that_are_not_chosen_are_not_imported() -> None:
    code = (
        "import sys, deploy.run.tracking.kinds; "
        "print({'tensorboardX', 'wandb', 'mlflow', 'trackio', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
