"""The fixture that loads a configuration from text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deploy import PRESETS
from distill.config import RunConfig
from distill.config.load import load_config


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    """Loads the text of a YAML file with overrides on top."""

    def load_text(text: str, overrides: Sequence[str] = ()) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, PRESETS)

    return load_text
