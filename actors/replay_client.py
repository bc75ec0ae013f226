"""The replay as an actor sees it that works for it."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

from distill.errors import NO_VALUE, first_line
from distill.interfaces import ReplayUnavailable


class ReplayClient:
    """Implements the actors' part of :class:`distill.interfaces.Replay` by a handle.

    The replay's process can die. Its successor has the same handle, so a call that was lost is repeated: it raises
    ReplayUnavailable.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        async def call(*args: object) -> Any:
            try:
                return await getattr(self._handle, method).remote(*args)
            except Exception as error:
                cause = getattr(error, "cause", error)  # Ray wraps what a method raised
                if isinstance(cause, ReplayUnavailable):
                    raise cause from error
                if is_gone(error):
                    raise ReplayUnavailable("replay", NO_VALUE, f"live; {first_line(error)}") from error
                raise

        return call


def is_gone(error: BaseException) -> bool:
    """Whether an error says that the actor's process has ended. Without Ray in this process, none does."""
    exceptions = sys.modules.get("ray.exceptions")
    if exceptions is None:
        return False
    gone = (
        exceptions.RayActorError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
    )
    return isinstance(error, gone)
