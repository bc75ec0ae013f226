"""The cache, which runs share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from deploy.run.cache import keep_proxy, note_proxy_training, proxy_training_s, remove_unfinished
from distill.room import NoSpace
from tests.media import fill, mounted


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


def test_a_cache_without_room_leaves_a_trained_proxy_where_it_is(tmp_path: Path) -> None:
    trained, cached = tmp_path / "run" / "proxy", tmp_path / "cache" / "proxies" / "1"
    (trained / "additional_chat_templates").mkdir(parents=True)
    for name in ("a.safetensors", "b.safetensors", "additional_chat_templates/tools.jinja"):
        (trained / name).write_bytes(bytes(200_000))
    note_proxy_training(trained, 7.0)
    with mounted(tmp_path / "cache", 1 << 20) as cache:
        filling = fill(cache, leave=300_000)
        with pytest.raises(NoSpace, match="DISTILL_CACHE"):
            keep_proxy(trained, cached)
        assert len(list(trained.iterdir())) == 4 and not cached.exists()
        filling.unlink()
        keep_proxy(trained, cached)
        assert len(list(cached.iterdir())) == 4 and not trained.exists()
        assert proxy_training_s(cached) == 7.0


def test_a_proxy_whose_training_was_not_timed_has_no_seconds(tmp_path: Path) -> None:
    assert proxy_training_s(tmp_path) is None
