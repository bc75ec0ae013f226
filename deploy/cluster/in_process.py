"""Actors as objects of the driver's process, for tiny models: there, Ray costs more time than it saves.

All actors live on one event loop in a thread. The handle of an actor has the form of Ray's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections.abc import Callable, Generator
from types import SimpleNamespace, TracebackType
from typing import Any, Self

from deploy.cluster.backend import Backend
from deploy.cluster.failures import ActorFailed, ActorGone
from deploy.cluster.scope import SharedFolder, SigtermAsCtrlC

_CLOSE_TIMEOUT_S = 30.0
_JOIN_TIMEOUT_S = 10.0


class Call:
    """A method call in progress on the actors' loop."""

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        self.future = future

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self.future).__await__()


class Handle:
    """An actor as the driver and other actors see it."""

    def __init__(self, actor: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._actor = actor
        self._loop = loop

    def renew(self, actor: Any) -> None:
        """Stand for another object from now on."""
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)

        async def call(*args: object) -> Any:
            result = method(*args)
            return await result if inspect.isawaitable(result) else result

        def remote(*args: object) -> Call:
            return Call(asyncio.run_coroutine_threadsafe(call(*args), self._loop))

        return SimpleNamespace(remote=remote)


class InProcess(Backend):
    """A :class:`Backend` whose loop runs while the context is open."""

    def __init__(self, run_id: str) -> None:
        self._shared = SharedFolder(run_id)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="actors", daemon=True)
        self._actors: dict[str, Any] = {}
        self._handles: dict[str, Handle] = {}
        self._revivals: dict[str, Callable[[], Any]] = {}

    def __enter__(self) -> Self:
        self._shared.claim()
        self._sigterm = SigtermAsCtrlC()
        self._thread.start()
        return self

    def service_pids(self) -> list[int]:
        return []

    def require_life(self) -> None:
        pass

    def node(self) -> None:
        return None

    def start_actor(
        self,
        name: str,
        actor_class: Any,
        *args: object,
        num_threads: int,
        num_cpus: float = 0.0,
        num_gpus: int = 0,
        revives: bool = False,
    ) -> Handle:
        """The numbers have no effect: the actors share the process's threads, whose number engines set."""
        try:
            self._actors[name] = actor_class(*args)
        except Exception as error:
            raise ActorFailed.raised(name, error) from error
        self._handles[name] = Handle(self._actors[name], self._loop)
        if revives:
            self._revivals[name] = lambda: actor_class(*args)
        return self._handles[name]

    def metrics_address(self) -> str | None:
        return None

    def actor_pid(self, name: str) -> int | None:
        return None

    def wait(
        self,
        calls: dict[str, Call],
        *,
        tick: Callable[[], None] = lambda: None,
        interval_s: float = 1.0,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        names = {call.future: name for name, call in calls.items()}
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
                    raise ActorFailed.raised(names[future], error) from error
            tick()
            if timeout_s is not None and pending and time.monotonic() - start > timeout_s:
                raise ActorGone.late((names[future] for future in pending), timeout_s)
        return results

    def failure(self, name: str, error: BaseException) -> Exception:
        return ActorFailed.raised(name, error)

    def poll(self, call: Call, timeout_s: float = 2.0) -> Any | None:
        try:
            return call.future.result(timeout_s)
        except Exception:
            return None

    def end_actor(self, name: str) -> None:
        actor = self._actors.pop(name)
        if hasattr(actor, "close"):
            self.poll(Handle(actor, self._loop).close.remote(), _CLOSE_TIMEOUT_S)

    def kill_actor(self, name: str, pid: int | None = None) -> None:
        if name in self._actors:
            self.end_actor(name)

    def revive_actor(self, name: str) -> None:
        self._actors[name] = self._revivals[name]()
        self._handles[name].renew(self._actors[name])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.poll(Call(asyncio.run_coroutine_threadsafe(_cancel_calls(), self._loop)), _CLOSE_TIMEOUT_S)
            for name in list(self._actors):
                self.end_actor(name)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=_JOIN_TIMEOUT_S)
            if not self._thread.is_alive():
                self._loop.close()
            self._shared.release()
            self._sigterm.restore()


async def _cancel_calls() -> None:
    """Cancel every other task of the loop, and wait until their cleanup is done."""
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
