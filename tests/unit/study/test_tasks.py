"""The settings that all runs of a task share, and the hash of its models."""

from __future__ import annotations

import pytest

from deploy import PRESETS
from deploy.study.tasks.registry import TASKS, identity
from distill.config.load import load_config


@pytest.mark.parametrize("task", TASKS)
def test_precision_does_not_depend_on_the_processor(task, tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("{}\n")
    overrides = [f"{name}={value}" for name, value in TASKS[task].settings(False).items()]
    config = load_config(empty, overrides, PRESETS)
    assert config.rollout.dtype == config.scoring.dtype == config.learner.precision == "float32"


def test_unfinished_folders_do_not_change_the_identity(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"weights")
    whole = identity(tmp_path)
    left = tmp_path / ".student.17.making"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert identity(tmp_path) == whole
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"other")
    assert identity(tmp_path) != whole
