"""The contract between the driver and whatever runs its actors.

:class:`deploy.cluster.ray_cluster.RayCluster` runs each actor in a process of Ray,
:class:`deploy.cluster.in_process.InProcess` runs all of them in the driver's process. The driver calls an
actor with ``handle.method.remote(...)`` and passes the call to :meth:`Backend.wait` or :meth:`Backend.poll`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self


class Backend(Protocol):
    """A context manager: actors run inside it, and leaving it ends all of them.

    SIGTERM inside it raises KeyboardInterrupt, as Ctrl-C does, because job schedulers end a run by it.
    """

    @property
    def pids(self) -> Mapping[str, int]:
        """Processes by actor; an actor of the driver's process has no entry."""
        ...

    def service_pids(self) -> list[int]:
        """Processes of the backend itself, from which those of the actors descend."""
        ...

    def start_actor(self, name: str, actor_class: Any, *args: object, num_threads: int) -> Any:
        """Create an actor, with ``num_threads`` as its thread budget; returns its handle.

        Raises: ActorFailed, or the actor's own DistillError, naming the actor.
        """
        ...

    def wait(
        self,
        work: dict[str, Any],
        *,
        tick: Callable[[], None] = lambda: None,
        interval_s: float = 1.0,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Wait for one call per actor, ticking meanwhile; the first failure ends the wait.

        ``work``: actor name -> call. Returns the results by name.
        Raises: ActorFailed, or the actor's own DistillError, naming the actor.
        """
        ...

    def poll(self, call: Any, timeout_s: float = 2.0) -> Any | None:
        """The value of a call if it comes in time, else None; also None when the call failed."""
        ...

    def end_actor(self, name: str) -> None:
        """Close an actor and free what it held."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
