"""A remote actor's handle as one of our protocols.

``Remote(handle).admit(4)`` is ``await``-able, like the local object's coroutine. Ray's
handles fit (`handle.method.remote(...)` gives an awaitable reference), and so does anything
else with that shape; nothing here imports Ray.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any


class Remote:
    """Forwards every method call to ``handle.<method>.remote``."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._handle, name).remote

    def __reduce__(self) -> tuple[type[Remote], tuple[Any]]:
        return Remote, (self._handle,)
