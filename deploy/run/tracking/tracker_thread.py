"""One tracker in a thread of its own, behind a bounded queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from deploy.run.tracking.tracker import Tracker

Call = Callable[[Tracker], None]
"""One call of a tracker."""


@dataclass(frozen=True)
class _End:
    failed: bool


class TrackerThread:
    """Opens a tracker and makes its calls, in order. Only :meth:`join` waits for it.

    The thread touches nothing of the run. It keeps the error that ends it in :attr:`error`, and its owner
    reports it. It is a daemon, so a tracker that waits for a network forever does not keep the process alive.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], queue_length: int) -> None:
        """``queue_length``: number of calls that may wait."""
        self.name = name
        self.num_dropped = 0
        """Calls that were dropped because the queue was full."""
        self.error: BaseException | None = None
        """What ended the tracker."""
        self._open = open_tracker
        self._queue_length = queue_length
        self._queue: SimpleQueue[Call | _End] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def offer(self, call: Call) -> None:
        """Queue a call, or drop it when too many wait. Nothing is queued for a tracker that has ended."""
        if not self._thread.is_alive():
            return
        if self._queue.qsize() >= self._queue_length:
            self.num_dropped += 1
        else:
            self._queue.put(call)

    def end(self, *, failed: bool) -> None:
        """Have the tracker close after the calls that wait. ``failed``: whether the run failed."""
        self._queue.put(_End(failed))

    def join(self, timeout_s: float) -> bool:
        """Wait for the tracker's end, at most ``timeout_s``; returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Calls that are queued."""
        return self._queue.qsize()

    def _work(self) -> None:
        try:
            tracker = self._open()
        except BaseException as error:  # also a library's SystemExit
            self.error = error
            return
        failed = True
        try:
            while not isinstance(item := self._queue.get(), _End):
                item(tracker)
            failed = item.failed
        except BaseException as error:
            self.error = error
        try:
            tracker.close(failed=failed)
        except BaseException as error:
            self.error = self.error or error
