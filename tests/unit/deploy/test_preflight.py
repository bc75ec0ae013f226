"""Checks of data, cache and run folder, without starting an engine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.deploy.conftest import Doctor, fault, passes


def test_references_of_held_out_prompts_cannot_be_trained_on(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "distill.data.prompts._choose_heldout", lambda rows, long, num, _: np.arange(rows) < num
    )
    rows = [{"prompt": f"say {i}", "completion": "so" if i < 8 else None} for i in range(24)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    preflight = doctor(None, f"data.path={path}", "sft.enabled=false")
    assert passes(preflight) and preflight.num_references == 0
    assert "have references (answers)" in fault(doctor(None, f"data.path={path}")).must


@pytest.mark.parametrize("below", ["", "/cache"])
def test_cache_in_a_file(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTILL_CACHE", f"{tmp_path}/file{below}")
    error = fault(doctor())
    assert (error.name, str(error.value)) == ("DISTILL_CACHE", f"{tmp_path}/file{below}")
    assert f"be a folder ({tmp_path}/file is a file)" in error.must
    monkeypatch.setenv("DISTILL_CACHE", f"{tmp_path}/new/cache")
    assert passes(doctor())
    assert not (tmp_path / "new").exists()


def test_cache_below_an_unwritable_home(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written to /proc, not even by the superuser."""
    monkeypatch.delenv("DISTILL_CACHE")
    monkeypatch.setenv("HOME", "/proc")
    error = fault(doctor())
    assert error.name == "DISTILL_CACHE" and "be writable (/proc: " in error.must


def test_unwritable_run_folder(doctor: Doctor) -> None:
    error = fault(doctor(None, "run_dir=/proc/run"))
    assert error.name == "run_dir" and "be writable (/proc: " in error.must


def test_tracker_that_is_not_installed(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert passes(doctor())
    preflight = doctor(None, "tracking.to=[tensorboard,wandb]")
    error = fault(preflight)
    assert (error.name, error.value) == ("tracking.to", "wandb")
    assert "`pip install wandb`" in error.remedy
    assert "teacher" not in [check.name for check in preflight.checks]  # it is found before a model is read
