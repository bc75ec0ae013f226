"""How often actors of a run may be started again."""

from __future__ import annotations

import time
from collections.abc import Callable

from deploy.cluster.failures import ActorFailed, ActorGone
from distill.config import ClusterConfig
from distill.errors import NO_VALUE, first_line

RESTARTS_PER_RUN = 1000
"""Incarnations of an actor that one incarnation of its run may use up, so that no two have the same name."""


class RestartBudget:
    """Counts the restarts of all actors of a run in a window of time.

    The bound is the run's and not an actor's, because what kills one actor after the other (too little memory, a
    broken file of weights) is seldom to be blamed on one of them. A failure that a long deadline notices counts for longer
    than the window, so that an actor which misses it again and again uses up the budget as well.
    """

    def __init__(self, config: ClusterConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._most = config.max_restarts
        self._window_s = config.restart_window_s
        self._now = now
        self._counts_until: list[float] = []
        self.num_restarts = 0
        """In all."""

    def take(self, actor: str, error: Exception) -> None:
        """Count a restart of an actor that failed by this error.

        Raises: the error, when no restarts are allowed; ActorFailed with it, when there were too many.
        """
        if self._most == 0:
            raise error
        now = self._now()
        self._counts_until = [end for end in self._counts_until if end >= now]
        if self.num_restarts + 1 >= RESTARTS_PER_RUN:
            raise ActorFailed(
                actor, NO_VALUE, f"live; it failed after {self.num_restarts} restarts in this start of the run, the last time "
                f"by: {first_line(error)}",
                "correct what it says; then resume the run",
            ) from error  # fmt: skip
        waited_s = error.waited_s if isinstance(error, ActorGone) else 0.0
        counts_s = max(self._window_s, (self._most + 1) * waited_s)
        if len(self._counts_until) >= self._most:
            raise ActorFailed(
                actor, NO_VALUE,
                f"live; it failed after {len(self._counts_until)} restarts within {counts_s:g} s, the last time by: "
                f"{first_line(error)}",
                "correct what it says, or raise cluster.max_restarts; then resume the run",
            ) from error  # fmt: skip
        self._counts_until.append(now + counts_s)
        self.num_restarts += 1
