"""Shows how far a long task is: one changing line on a terminal, and a plain line now and then elsewhere.

It needs only the standard library, because deploy/setup.sh uses it before any package is installed.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TextIO

TERMINAL_INTERVAL_S = 0.2
PLAIN_INTERVAL_S = 15.0
"""Seconds between two plain lines. A shorter task prints none."""
_BAR_WIDTH = 16


class State(NamedTuple):
    """What the line shows."""

    text: str
    fraction: float | None = None
    """Share of the task that is done, in [0, 1]. None: not known."""


@contextmanager
def live_line(state: Callable[[], State]) -> Iterator[None]:
    """Show ``state()`` and the elapsed time on stdout while the block runs; a terminal's line is erased at the end."""
    stream, ended, start = sys.stdout, threading.Event(), time.monotonic()
    draw, interval = (_draw, TERMINAL_INTERVAL_S) if stream.isatty() else (_print, PLAIN_INTERVAL_S)

    def run() -> None:
        while not ended.wait(interval):
            draw(stream, state(), time.monotonic() - start)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if stream.isatty():
            _replace(stream, "")
            stream.write("\r")
            stream.flush()


def _draw(stream: TextIO, state: State, elapsed_s: float) -> None:
    bar = ""
    if state.fraction is not None:
        filled = int(_BAR_WIDTH * state.fraction)
        bar = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {state.fraction:4.0%}  "
    _replace(stream, f"{bar}{clock(elapsed_s)}  {state.text}")


def _replace(stream: TextIO, text: str) -> None:
    width = shutil.get_terminal_size().columns - 1  # a line as long as the terminal would scroll it
    stream.write(f"\r{text[:width]:<{width}}")
    stream.flush()


def _print(stream: TextIO, state: State, elapsed_s: float) -> None:
    share = "" if state.fraction is None else f"{state.fraction:.0%}, "
    print(f"{state.text}: {share}{clock(elapsed_s)}", file=stream, flush=True)


def clock(seconds: float) -> str:
    """``4:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
