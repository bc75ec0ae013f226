"""A running actor as the driver's coroutines see it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from deploy.cluster.failures import ActorGone


class NamesFailures(Protocol):
    """The part of a backend that an actor needs."""

    def failure(self, name: str, error: BaseException) -> Exception: ...


class Actor:
    """Calls the methods of a handle; what fails has the actor's name.

    ``await actor.method(...)`` starts the call when it is made, not when it is awaited.
    """

    def __init__(
        self, name: str, handle: Any, backend: NamesFailures, *, stall_timeout_s: float | None = None
    ) -> None:
        """``stall_timeout_s``: seconds after which a call fails; None for an actor whose calls may wait for others."""
        self._stall_timeout_s = stall_timeout_s
        self.name = name
        self.handle = handle
        """For other actors, which call it themselves."""
        self._backend = backend

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: object) -> Awaitable[Any]:
            return self.result(getattr(self.handle, method).remote(*args))

        return call

    async def within(
        self, seconds: float | None, method: str, *args: object, setting: str = "cluster.beat_timeout_s"
    ) -> Any:
        """Call a method that answers at once unless the actor hangs. ``setting``: where the seconds are from.

        Raises: ActorFailed when there is no answer in time.
        """
        try:
            async with asyncio.timeout(seconds):
                return await getattr(self, method)(*args)
        except TimeoutError:
            assert seconds is not None
            raise ActorGone.silent(self.name, seconds, setting) from None

    async def result(self, call: Awaitable[Any]) -> Any:
        """Wait for a call that was made through the handle. Raises: the actor's error, with its name; ActorFailed."""
        deadline = asyncio.timeout(self._stall_timeout_s)
        try:
            async with deadline:
                return await call
        except Exception as error:
            if deadline.expired():
                assert self._stall_timeout_s is not None
                raise ActorGone.stalled(self.name, self._stall_timeout_s, self._stall_timeout_s) from None
            raise self._backend.failure(self.name, error) from error
