"""How a command ends: with its exit code, and with one line on stderr for an error that the user can act on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from distill.errors import DistillError

DONE, INTERRUPTED = 0, 130

Arguments = TypeVar("Arguments")


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends by ``error``; an error's class defines it."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, DistillError) else DistillError.exit_code


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
    """Print one line for the user on stderr."""
    print(f"distill: {message}", file=sys.stderr)
