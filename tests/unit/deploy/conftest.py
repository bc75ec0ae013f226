"""The tests' tiny models, made once per file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, rows and a configuration file."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder
