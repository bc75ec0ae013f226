"""All trackers of a run, seen from the driver: nothing that happens to one of them slows or ends the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from deploy.run.tracking.tracker import Tracker
from deploy.run.tracking.tracker_thread import Call, TrackerThread
from distill.errors import first_line
from distill.redaction import redacted
from distill.run.metrics import EventLog

QUEUE_LENGTH = 1000
"""Calls of a tracker that may wait. A row of 100 numbers takes about 10 KB."""
CLOSE_S = 10.0
"""Seconds in which all trackers together may deliver what is left when a run ends."""
INTERRUPTED_CLOSE_S = 2.0
"""The same for a run that is interrupted. Ray kills a job three seconds after it has asked it to stop."""
_LONGEST_REASON = 300


class Trackers:
    """Passes the numbers of a run to its trackers.

    No call waits for a tracker, except the end of the ``with`` block, which waits for a limited time. An error of a
    tracker ends only this tracker. :meth:`report` and the end of the block report it, each error once.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[[], Tracker]],
        say: Callable[[str], None],
        events: EventLog,
        *,
        leave_at_once: Callable[[], None],
        queue_length: int = QUEUE_LENGTH,
        close_s: float = CLOSE_S,
    ) -> None:
        """``openers``: a function for each tracker that opens it, by name. ``say``: prints a line that stays.

        ``leave_at_once`` is called when a tracker has failed or does not end: its library can have threads and exit
        functions that wait for a network, and the process must not wait for those.
        """
        self._say = say
        self._events = events
        self._leave_at_once = leave_at_once
        self._close_s = close_s
        self._failed: set[str] = set()
        self._slow: set[str] = set()
        self._threads = [TrackerThread(name, opener, queue_length) for name, opener in openers.items()]

    def log_numbers(self, update: int, numbers: Mapping[str, float | None]) -> None:
        """Pass the numbers of an update on, except for those that are not finite or missing."""
        finite = {
            name: float(value)
            for name, value in numbers.items()
            if value is not None and math.isfinite(value)
        }
        self._offer(lambda tracker: tracker.log_numbers(update, finite))

    def log_text(self, update: int, name: str, text: str) -> None:
        self._offer(lambda tracker: tracker.log_text(update, name, text))

    def report(self) -> None:
        """Report trackers that have failed or do not keep up, each once."""
        for thread in self._threads:
            if thread.error is not None and thread.name not in self._failed:
                self._failed.add(thread.name)
                self._leave_at_once()
                reason = redacted(first_line(thread.error))[:_LONGEST_REASON]
                self._events.write("tracker_failed", tracker=thread.name, reason=reason)
                self._warn(
                    f"tracker {thread.name} has failed and gets no more numbers of this run ({reason})"
                )
            if thread.num_dropped and thread.name not in self._slow:
                self._slow.add(thread.name)
                self._warn(f"tracker {thread.name} does not keep up; it lacks rows that metrics.parquet has")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        try:
            self._end(
                kind is not None, min(self._close_s, INTERRUPTED_CLOSE_S) if interrupted else self._close_s
            )
        finally:
            if any(not thread.join(0) for thread in self._threads):
                self._leave_at_once()
            self._events.close()

    def _end(self, failed: bool, timeout_s: float) -> None:
        for thread in self._threads:
            thread.end(failed=failed)
        deadline = time.monotonic() + timeout_s
        ended = {thread.name: thread.join(max(0.0, deadline - time.monotonic())) for thread in self._threads}
        self.report()
        for thread in self._threads:
            left = thread.num_waiting if thread.error is None and not ended[thread.name] else 0
            self._events.write(
                "tracker_closed",
                tracker=thread.name,
                ended=ended[thread.name],
                num_dropped=thread.num_dropped,
            )
            if not ended[thread.name]:
                what = f"did not finish within {timeout_s:.0f} s and may lack the last numbers ({left} calls wait)"
                self._warn(f"tracker {thread.name} {what}")

    def _offer(self, call: Call) -> None:
        for thread in self._threads:
            thread.offer(call)

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")
