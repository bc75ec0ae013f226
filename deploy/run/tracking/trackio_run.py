"""Trackio: a run that is found again by its name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from deploy.run.tracking.tracker import TrackedRun


class TrackioRun:
    """Logs rows into Trackio's local database, or where its environment variables say."""

    def __init__(self, run: TrackedRun) -> None:
        trackio: Any = import_module("trackio")
        self._warn_level = trackio.AlertLevel.WARN
        self._run: Any = trackio.init(
            project=run.project,
            name=run.name,
            resume="allow",
            config=dict(run.settings),
            embed=False,
        )

    def log_numbers(self, update: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=update)

    def log_text(self, update: int, name: str, text: str) -> None:
        self._run.alert(title=f"{name} after update {update}", text=text, level=self._warn_level)

    def close(self, *, failed: bool) -> None:
        self._run.finish()
