"""The actors of a run as objects of one process: for tiny models, where Ray costs more than it gives.

:class:`InProcess` has the methods of :class:`deploy.cluster.ray_cluster.Cluster`. All actors live on one event
loop in a thread; a handle's methods are called as Ray's are (``handle.method.remote(...)``) and
answer with a :class:`Call`, which the driver's thread waits for and the loop can await.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections.abc import Callable, Generator
from types import SimpleNamespace, TracebackType
from typing import Any

from deploy.cluster.ray_cluster import ActorFailed, root_cause
from deploy.cluster.scope import SharedFolder, SigtermAsCtrlC


class Call:
    """A method call under way on the actors' loop."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self.future = future

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self.future).__await__()


class Handle:
    """An actor as others see it."""

    def __init__(self, actor: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._actor = actor
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)

        async def call(*args: object) -> Any:
            answer = method(*args)
            return await answer if inspect.isawaitable(answer) else answer

        def remote(*args: object) -> Call:
            return Call(asyncio.run_coroutine_threadsafe(call(*args), self._loop))

        return SimpleNamespace(remote=remote)


class InProcess:
    """A context manager: the loop runs inside it; leaving it closes every actor."""

    def __init__(self, run_id: str) -> None:
        self._shared = SharedFolder(run_id)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="actors", daemon=True)
        self.handles: dict[str, Handle] = {}
        self.pids: dict[str, int] = {}
        """Processes of actors: none but the driver's."""

    def __enter__(self) -> InProcess:
        self._shared.claim()
        self._sigterm = SigtermAsCtrlC()
        self._thread.start()
        return self

    def service_pids(self) -> list[int]:
        return []

    def start_actor(self, name: str, actor_class: Any, *args: object, num_threads: int) -> Handle:
        """``num_threads`` is the process's own affair: its engines set it."""
        handle = Handle(actor_class(*args), self._loop)
        self.handles[name] = handle
        return handle

    def wait(
        self,
        work: dict[str, Call],
        *,
        tick: Callable[[], None] = lambda: None,
        interval_s: float = 1.0,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """As :meth:`deploy.cluster.ray_cluster.Cluster.wait`."""
        names = {call.future: name for name, call in work.items()}
        results: dict[str, Any] = {}
        start = time.monotonic()
        pending = set(names)
        while pending:
            done, pending = concurrent.futures.wait(
                pending, timeout=interval_s, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                try:
                    results[names[future]] = future.result()
                except Exception as error:
                    cause = root_cause(error)
                    raise ActorFailed.raised(names[future], cause) from error
            tick()
            if timeout_s is not None and pending and time.monotonic() - start > timeout_s:
                raise ActorFailed.late((names[future] for future in pending), timeout_s)
        return results

    def poll(self, call: Call, timeout_s: float = 2.0) -> Any | None:
        """The value of a call if it comes in time, else None."""
        try:
            return call.future.result(timeout_s)
        except Exception:
            return None

    def end_actor(self, name: str) -> None:
        """Close an actor and forget it."""
        handle = self.handles.pop(name)
        if hasattr(handle._actor, "close"):
            self.poll(handle.close.remote(), timeout_s=30.0)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._loop.call_soon_threadsafe(self._cancel_all)
            for name in list(self.handles):
                self.end_actor(name)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10.0)
            self._shared.release()
            self._sigterm.restore()

    def _cancel_all(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
