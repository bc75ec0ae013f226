"""The cache, which runs share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from deploy.run.cache import remove_unfinished


@pytest.mark.parametrize("folder", ["corpora", "corpora/7f.parts", "proxies", "models", "."])
def test_what_killed_writers_left_is_deleted_a_day_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    place = tmp_path / folder
    place.mkdir(parents=True, exist_ok=True)
    ages_h = {".dead.7-0.tmp": 25, ".living.7-1.tmp": 23, "kept": 1000}
    for name, age in ages_h.items():
        (place / name).write_text("x")
        os.utime(place / name, (0, time.time() - 3600 * age))
    remove_unfinished()
    assert {path.name for path in place.iterdir() if path.name in ages_h} == {".living.7-1.tmp", "kept"}


def test_an_absent_cache_has_nothing_to_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "none"))
    remove_unfinished()
    assert not (tmp_path / "none").exists()
