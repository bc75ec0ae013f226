"""How an actor spends its time: busy, storing, or waiting; and one axis of time for all processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EPOCH_NS = time.time_ns() - time.monotonic_ns()
"""Nanoseconds since 1970 when the monotonic clock was zero. It is determined once per process, so that a wall clock
that is set later moves nothing."""


def epoch_ns() -> int:
    """Return nanoseconds since 1970, by a clock that never goes back. Processes on any node share its axis."""
    return time.monotonic_ns() + _EPOCH_NS


SILENT = "engine_silent_s"
"""The name of :attr:`BusyClock.silent_s` in what an actor says of itself. It is no counter, so it is not added up."""


class BusyClock:
    """Divides the time of an actor among three states, which add up to all of it.

    It is busy while at least one call of its engine runs, whatever else is true. Otherwise it is storing while it
    holds work, whose rows are being built and written. Otherwise it waits, from the first :meth:`hold` to
    :meth:`stop`.
    """

    def __init__(self, now: Callable[[], float] | None = None) -> None:
        """``now``: the clock, in seconds; None for the machine's."""
        self._now = now or time.monotonic
        self._num_running = 0
        self._holds: bool | None = None
        """Whether the actor holds work; None before the first and after the last."""
        self._since = 0.0
        self._moved = 0.0
        """When a call or a part of one was last seen to end, or a call began while no other ran."""
        self._num_finished = 0
        self._spent = {"busy": 0.0, "storing": 0.0, "waiting": 0.0}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds of a ``with`` block as busy; overlapping blocks count once."""
        self._settle()
        if not self._num_running:
            self._moved = self._since
        self._num_running += 1
        try:
            yield
        finally:
            self._settle()
            self._num_running -= 1
            self._moved = self._since

    def hold(self, holds: bool) -> None:
        """From now on, the actor holds work or does not."""
        self._settle()
        self._holds = holds

    def stop(self) -> None:
        """From now on, only calls count."""
        self._settle()
        self._holds = None

    @property
    def busy_s(self) -> float:
        """Busy seconds so far, running calls included."""
        self._settle()
        return self._spent["busy"]

    @property
    def storing_s(self) -> float:
        """Seconds in which work was held and no call ran."""
        self._settle()
        return self._spent["storing"]

    @property
    def waiting_s(self) -> float:
        """Seconds in which nothing was held and no call ran."""
        self._settle()
        return self._spent["waiting"]

    def silent_s(self, num_finished: int) -> float:
        """Seconds for which calls have run and nothing has ended, as far as was seen; 0 while none runs.

        ``num_finished``: of the parts of calls so far.
        """
        if num_finished != self._num_finished:
            self._num_finished, self._moved = num_finished, self._now()
        return self._now() - self._moved if self._num_running else 0.0

    def _settle(self) -> None:
        """Count the time since the last call for the state that lasted until now."""
        now = self._now()
        elapsed_s, self._since = now - self._since, now
        if self._num_running:
            self._spent["busy"] += elapsed_s
        elif self._holds is not None:
            self._spent["storing" if self._holds else "waiting"] += elapsed_s
