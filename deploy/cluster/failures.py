"""What the driver raises when an actor fails, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Iterable

from distill.errors import NO_VALUE, DistillError


class ActorFailed(DistillError, RuntimeError):
    """An actor raised an error, died, or did not answer in time."""

    code = "actor"

    @classmethod
    def raised(cls, actor: str, cause: BaseException) -> DistillError:
        """What an actor raised: its own error where that is one for the user, with the actor's name."""
        if isinstance(cause, DistillError):
            return cause.within(actor)
        return cls(actor, NO_VALUE, f"finish its work; it raised {type(cause).__name__}: {cause}")

    @classmethod
    def late(cls, actors: Iterable[str], timeout_s: float) -> ActorFailed:
        return cls(
            ", ".join(sorted(actors)), NO_VALUE, f"answer within {timeout_s:.0f} s",
            "raise cluster.start_timeout_s, or look at the actors' logs under /tmp/ray",
        )  # fmt: skip


def root_cause(error: BaseException) -> BaseException:
    """The first failure inside groups and chains: what the user has to know."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif getattr(error, "cause", None) is not None and isinstance(error.cause, BaseException):  # pyright: ignore
            error = error.cause  # pyright: ignore[reportAttributeAccessIssue]
        else:
            return error
