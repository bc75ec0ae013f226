"""Checks of data, cache and run folder, without starting an engine."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deploy.run.preflight.outcome import Check
from distill.machine.container import MemoryLimit
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


def test_little_shared_memory_is_a_warning_with_numbers_and_counts_as_disk(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, estimates = shutil.disk_usage, doctor().estimates
    wanted, weights = estimates.shared_memory(), estimates.weights_in_memory()

    def check(free: int, disk: int = 1 << 40) -> dict[str, Check]:
        monkeypatch.setattr(
            "deploy.run.preflight.machine.shutil.disk_usage",
            lambda path: usage("/")._replace(free=free if Path(path) == Path("/dev/shm") else disk),
        )
        return {check.name: check for check in doctor().checks}

    assert check(wanted)["shared memory"].status == "pass"
    rows, both = check(wanted - 1)["shared memory"], check(weights - 1)["shared memory"]
    assert rows.status == both.status == "warn"
    assert f"needs {wanted >> 20} MiB at /dev/shm, {weights >> 20} MiB of it for weights, but" in rows.message
    assert "so some rows go to the run folder" in rows.message and "larger /dev/shm" in rows.remedy
    assert "so weights and rows go to the run folder" in both.message
    need = estimates.student_parameters() * (3 * 12 + 4 * 4)
    assert check(wanted, need)["disk"].status == "pass"
    assert check(1, need)["disk"].status == "fail"
    assert check(0, need + wanted)["disk"].status == "pass"


def test_the_memory_check_counts_shared_memory_and_names_the_containers_limit(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(limit: MemoryLimit | None) -> Check:
        free = limit.free_bytes if limit is not None else 1 << 40
        monkeypatch.setattr("deploy.run.preflight.machine.memory_limit", lambda: limit)
        monkeypatch.setattr("deploy.run.preflight.machine.available_memory", lambda: free)
        return next(check for check in doctor().checks if check.name == "memory")

    assert check(None).status == "pass" and "rows and weights 0." in check(None).message
    small = check(MemoryLimit(2 << 30, 1 << 30))
    assert small.status == "warn" and small.remedy.startswith(
        "give the container more memory, lower kv_cache_gib"
    )
    assert "of 1.0 GiB available within the container's limit of 2.0 GiB" in small.message
