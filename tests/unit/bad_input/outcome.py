"""How bad input may end: with exactly what was meant, or with an error that a user can act on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hypothesis import HealthCheck, settings

from distill.errors import DistillError

T = TypeVar("T")


def cases(number: int) -> settings:
    """The same cases in every run, so that CI cannot fail by chance."""
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of an input."""

    accepted: T | None
    error: DistillError | None


def outcome_of(read: Callable[[], T]) -> Outcome[T]:
    """Read an input. Only the project's own errors are caught, each of which has to say what is wrong."""
    try:
        return Outcome(read(), None)
    except DistillError as error:
        assert error.name and error.must, "an error names the thing and the rule"
        assert len(error.must) < 2000, "an error is a line, and not a copy of the input"
        return Outcome(None, error)
