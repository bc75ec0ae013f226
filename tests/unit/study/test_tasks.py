"""The tasks' settings: what every run of a study has in common."""

from __future__ import annotations

import pytest

from deploy import PRESETS
from deploy.study.tasks.registry import TASKS, identity
from distill.config.load import load_config


@pytest.mark.parametrize("task", TASKS)
def test_a_studys_numbers_do_not_hang_on_what_the_processor_computes_fast(task, tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("{}\n")
    overrides = [f"{name}={value}" for name, value in TASKS[task].settings(False).items()]
    config = load_config(empty, overrides, PRESETS)
    assert config.rollout.dtype == config.scoring.dtype == config.learner.precision == "float32"


def test_a_making_that_was_killed_is_no_part_of_a_task(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"weights")
    whole = identity(tmp_path)
    left = tmp_path / ".student.17.making"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert identity(tmp_path) == whole
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"other")
    assert identity(tmp_path) != whole
