"""Makes the handle of a remote actor usable as one of the protocols in :mod:`distill.interfaces`.

``Remote(handle).admit(4)`` is awaitable, like the coroutine of a local object. It works with Ray's handles,
because ``handle.method.remote(...)`` returns an awaitable reference, and with everything else of that shape.
This module does not import Ray.
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
