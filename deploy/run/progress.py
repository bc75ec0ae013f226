"""The progress of a long command: one changing line on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.status import Status
from rich.text import Text

from deploy.safe_text import one_line, printable

_PLAIN_INTERVAL_S = 15.0
"""Seconds between plain lines of one stage."""


class Progress:
    """What the user sees while a command runs."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._status: Status | None = None
        self._last_plain = 0.0
        self._last_text = ""
        self._start = time.monotonic()

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._status = self.console.status("starting", spinner="line")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def say(self, text: str) -> None:
        """Print a line that stays. It may quote others, so it can neither colour nor move anything."""
        self.console.print(Text(f"[{_clock(time.monotonic() - self._start)}] {printable(text)}"))

    def show(self, text: str, *, force: bool = False) -> None:
        """Replace the changing line. Without a terminal, print it if the last one is old or with ``force``."""
        if self._status is not None:
            self._status.update(Text(one_line(text)))
            return
        now = time.monotonic()
        due = force or now - self._last_plain >= _PLAIN_INTERVAL_S
        if due and text != self._last_text:
            self.say(text)
            self._last_plain = now
            self._last_text = text


def training_line(facts: Mapping[str, object], rates: Mapping[str, float]) -> str:
    """Format the learner's facts: ``update 7/20 | rollout 310 tok/s | ... | policy age 0 | ETA 6:10``."""
    parts = [f"update {facts.get('update', 0)}/{facts.get('num_updates', '?')}"]
    parts += [f"{stage} {rate:.0f} tok/s" for stage, rate in rates.items()]
    parts.append(f"policy age {facts.get('policy_age', 0)}")
    if "limit" in facts:
        parts.append(f"limit {facts['limit']}")
    eta = facts.get("eta_s")
    parts.append(f"ETA {_clock(float(eta))}" if isinstance(eta, int | float) else "ETA -")
    if facts.get("activity") not in (None, "training"):
        parts.append(str(facts["activity"]))
    return " | ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
