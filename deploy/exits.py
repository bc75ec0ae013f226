"""How a command ends: with its exit code, and with one line on stderr for an error that the user can act on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from deploy.safe_text import one_line
from distill.errors import DistillError

DONE, INTERRUPTED = 0, 130

Arguments = TypeVar("Arguments")


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends by ``error``; an error's class defines it."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, DistillError) else DistillError.exit_code


_AT_ONCE = threading.Event()


def leave_at_once() -> None:
    """Have :func:`leave` end the process without the threads and exit functions of libraries.

    A library that has lost its server can wait there for minutes.
    """
    _AT_ONCE.set()


def leave(code: int) -> int:
    """Return the exit code of the process, or end it now if :func:`leave_at_once` was called."""
    if _AT_ONCE.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def guarded(run: Callable[[Arguments], int], arguments: Arguments) -> int:
    """Run a command and return its exit code; an error of the user or the system becomes one line."""
    try:
        return run(arguments)
    except KeyboardInterrupt as error:
        complain("interrupted")
        return exit_code(error)
    except (DistillError, OSError) as error:  # OSError: a full disk, a path that cannot be created
        complain(str(error))
        return exit_code(error)


def complain(message: str) -> None:
    """Print one line for the user on stderr. A message may quote a row of a data set or a library's error."""
    print(f"distill: {one_line(message)}", file=sys.stderr)
