"""What a tracker is, and what it knows of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Shows the numbers of a run elsewhere, in files or on a server.

    All calls come from one thread, which has also made the object. They may block, and may raise anything.
    """

    def log_numbers(self, update: int, numbers: Mapping[str, float]) -> None:
        """Take finite numbers by name, as they were after an update. An update can come more than once, and late."""
        ...

    def log_text(self, update: int, name: str, text: str) -> None:
        """Take a text, such as an alarm, that belongs to an update."""
        ...

    def close(self, *, failed: bool) -> None:
        """Deliver what is left. ``failed``: the run ends by an error or was interrupted."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker knows of a run before the first number."""

    run_id: str
    """A resumed run has the same, so a tracker continues what it has."""
    name: str
    """The name that a person reads; it contains the id, so it is unique too."""
    project: str
    folder: Path
    incarnation: int
    """How often the run was started, including this time."""
    updates_done: int
    """Updates before the first one that is recorded now. What was recorded of later ones is superseded."""
    settings: Mapping[str, Any]
    """The configuration, by dotted name."""
