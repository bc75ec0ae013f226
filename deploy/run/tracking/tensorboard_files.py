"""TensorBoard: event files in the folder ``tensorboard`` of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from deploy.run.tracking.tracker import TrackedRun

FOLDER = "tensorboard"
"""The folder within a run folder."""


class TensorBoardFiles:
    """Writes one event per row. The library's queue and thread are not used, so that a full disk raises here.

    Every start of a run writes a file of its own. TensorBoard reads the files in the order of their names, and drops
    what earlier ones have from the first update that is made again on.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._events: Any = import_module("tensorboardX.proto.event_pb2")
        self._summaries: Any = import_module("tensorboardX.proto.summary_pb2")
        self._text_summary: Any = import_module("tensorboardX.summary").text
        folder = run.folder / FOLDER
        folder.mkdir(exist_ok=True)
        continues = any(folder.glob("*.tfevents.*"))
        self._writer: Any = import_module("tensorboardX.event_file_writer").EventsWriter(
            str(folder / "events"), filename_suffix=f".{run.incarnation:04d}"
        )
        # Version 2 turns off a reader's guess that a run began again wherever the update falls.
        self._write(0, file_version="brain.Event:2")
        if continues:
            first = (
                run.updates_done + 1 if run.updates_done else 0
            )  # a new run also evaluates before update 1
            started = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(first, session_log=started)
        self.log_text(run.updates_done, "settings", _as_table(run.settings))

    def log_numbers(self, update: int, numbers: Mapping[str, float]) -> None:
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()
        ]
        self._write(update, summary=self._summaries.Summary(value=values))

    def log_text(self, update: int, name: str, text: str) -> None:
        self._write(update, summary=self._text_summary(name, text))

    def close(self, *, failed: bool) -> None:
        self._writer.close()

    def _write(self, update: int, **content: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=update, **content))
        self._writer.flush()


def _as_table(settings: Mapping[str, Any]) -> str:
    """The settings as Markdown, which TensorBoard shows."""
    rows = [f"| {name} | `{value}` |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])
