"""Errors as data: the parts of every failure that a user can act on.

An error names the thing that is wrong, its value, the rule that the value breaks, and the remedy. Only
this module formats them as the line that the user reads. The command line takes its exit code from
the error's class, and a failed run writes the parts to ``failure.json``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Self


class _Missing(Enum):
    MISSING = "missing"

    def __reduce__(self) -> str:
        return "NO_VALUE"  # one object in every process, so that `is` holds after pickling


NO_VALUE = _Missing.MISSING
"""The value of an error about a thing that has no printable value."""


class DistillError(Exception):
    """A failure with a name, a value, a rule and a remedy; ``str()`` is the line for the user."""

    code = "failed"
    """A stable name for the kind of failure, for programs that read ``failure.json``."""
    exit_code = 1
    """The exit code of a command that ends with this error."""

    def __init__(self, name: str | Path, value: object, must: str, remedy: str = "") -> None:
        # Exception pickles its arguments, so it gets all of them: errors cross processes.
        super().__init__(name, value, must, remedy)
        self.name = str(name)
        self.value = value
        self.must = must
        self.remedy = remedy

    @property
    def statement(self) -> str:
        """Name, value and rule without the remedy."""
        subject = self.name if self.value is NO_VALUE else f"{self.name}={self.value}"
        return f"{subject} must {self.must}"

    def __str__(self) -> str:
        return f"{self.statement}; {self.remedy}" if self.remedy else self.statement

    def within(self, context: str) -> Self:
        """Return the same error with ``context`` before its name."""
        return type(self)(f"{context}: {self.name}", self.value, self.must, self.remedy)

    def parts(self) -> dict[str, Any]:
        """Return the parts for JSON."""
        value = None if self.value is NO_VALUE else str(self.value)
        return {
            "code": self.code,
            "name": self.name,
            "value": value,
            "must": self.must,
            "remedy": self.remedy,
            "message": str(self),
        }


class ConfigError(DistillError, ValueError):
    """A request that cannot be carried out: a wrong setting, file, model or argument."""

    code = "config"
    exit_code = 2


class Diverged(DistillError, FloatingPointError):
    """A loss, gradient, score or measured value that is not finite."""

    code = "diverged"
    stage = ""
    """The stage of an update that raised it: scores, critics or student. It is empty outside updates."""


def did_you_mean(
    wrong: str, names: Iterable[str], otherwise: str = "choose one of them", *, prefix: str = ""
) -> str:
    """Return the remedy for a mistyped name: the nearest of ``names``, or ``otherwise``.

    ``prefix``: the text that precedes the name where the user writes it.
    """
    near = difflib.get_close_matches(wrong, list(names), 1)
    return f"did you mean {prefix}{near[0]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Return the first line of an error without its final punctuation, or the error's class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".;")
