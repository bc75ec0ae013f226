"""How long an actor was busy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class BusyClock:
    """Adds up the seconds in which at least one call runs; overlapping calls count once."""

    def __init__(self) -> None:
        self._num_running = 0
        self._since = 0.0
        self._finished_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds of a ``with`` block as busy."""
        if self._num_running == 0:
            self._since = time.monotonic()
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._finished_s += time.monotonic() - self._since

    @property
    def busy_s(self) -> float:
        """Busy seconds so far, running calls included."""
        running_s = time.monotonic() - self._since if self._num_running else 0.0
        return self._finished_s + running_s
