"""Checks of a configuration, without starting an engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deploy.run.preflight import Preflight
from distill.errors import ConfigError
from tests.tiny import tiny_config

TRANSFORMERS = ["rollout.engine=transformers", "scoring.engine=transformers"]


def checked(world: Path, *overrides: str) -> Preflight:
    preflight = Preflight(tiny_config(world, *TRANSFORMERS, *overrides))
    preflight.run()
    preflight.require()
    return preflight


def test_references_of_held_out_prompts_cannot_be_trained_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.data.prompts._choose_heldout", lambda rows, num, _: np.arange(rows) < num)
    rows = [{"prompt": f"say {i}", "completion": "so" if i < 8 else None} for i in range(24)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert checked(world, f"data.path={path}", "sft.enabled=false").num_references == 0
    with pytest.raises(ConfigError, match=r"must have references \(answers\)"):
        checked(world, f"data.path={path}")
