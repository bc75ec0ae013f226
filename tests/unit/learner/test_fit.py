"""A training by cross-entropy resumes from its checkpoint, and begins anew if that is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distill.run.metrics import EventLog, read_events
from learner.process.checkpoint import MANIFEST, OtherFormat
from learner.process.fit import _resume
from tests.unit.learner.test_checkpoint import SHARD, flip, make, rewrite

NOTHING: Any = None


def test_a_damaged_checkpoint_is_named_and_the_stage_begins_anew(tmp_path: Path) -> None:
    checkpoints = make(tmp_path / "sft-checkpoints", 10, keep=1)
    flip(checkpoints.path(10) / SHARD)
    assert _resume(checkpoints, NOTHING, NOTHING, EventLog(tmp_path)) == (0, 0.0)
    assert checkpoints.steps() == []
    [event] = read_events(tmp_path)
    assert event["event"] == "checkpoint_damaged" and "step-10" in event["damage"]


def test_one_of_another_version_stays(tmp_path: Path) -> None:
    checkpoints = make(tmp_path / "sft-checkpoints", 10, keep=1)
    rewrite(checkpoints.path(10) / MANIFEST, format_version=99)
    with pytest.raises(OtherFormat):
        _resume(checkpoints, NOTHING, NOTHING, EventLog(tmp_path))
    assert checkpoints.steps() == [10]
