"""What the stages of a run require of the place where its actors live."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from deploy.placement import Node


class Backend(Protocol):
    """Starts actors, waits for their calls and ends them. A context manager: nothing of the run outlives it.

    ``start_actor`` returns a handle; ``handle.method.remote(...)`` starts a call and returns at once. The
    driver's thread waits for a call with :meth:`wait` or :meth:`poll`, and another actor awaits it.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close every actor and remove the run's folder in shared memory."""
        ...

    def service_pids(self) -> list[int]:
        """Processes of the backend itself, apart from those of the actors and the driver."""
        ...

    def require_life(self) -> None:
        """Raise BackendEnded when what runs the actors has ended. It costs little."""
        ...

    def node(self) -> Node | None:
        """The node on which all actors run and which they share with other jobs; None if the run has it alone."""
        ...

    def start_actor(
        self,
        name: str,
        actor_class: Any,
        *args: object,
        num_threads: int,
        num_cpus: float = 0.0,
        num_gpus: int = 0,
        revives: bool = False,
    ) -> Any:
        """Construct an actor with a budget of threads and what it takes of a shared node; returns its handle.

        ``revives``: if its process dies, it is constructed again, and the handle stays valid.

        Raises: ActorFailed, or the constructor's own DistillError, with the actor's name.
        """
        ...

    def metrics_address(self) -> str | None:
        """HOST:PORT where Prometheus finds this node's numbers; None where nothing publishes them."""
        ...

    def actor_pid(self, name: str) -> int | None:
        """The process of an actor; None when that is the driver's."""
        ...

    def wait(
        self,
        calls: dict[str, Any],
        *,
        tick: Callable[[], None] = lambda: None,
        interval_s: float = 1.0,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Wait for one call per actor; returns the results by actor.

        ``tick`` runs about every ``interval_s``. The first failure ends the wait.

        Raises: ActorFailed, or the actor's own DistillError, with the actor's name.
        """
        ...

    def failure(self, name: str, error: BaseException) -> Exception:
        """The error for what a call to an actor raised, with the actor's name: an ActorFailed or the actor's own."""
        ...

    def poll(self, call: Any, timeout_s: float = 2.0) -> Any | None:
        """The result of a call, or None when it fails or does not return in time."""
        ...

    def end_actor(self, name: str) -> None:
        """Close an actor and its processes."""
        ...

    def kill_actor(self, name: str, pid: int | None = None) -> None:
        """End an actor that has failed, and its processes, without asking it. It need not be there.

        ``pid``: only if this is still its process.
        """
        ...

    def revive_actor(self, name: str) -> None:
        """Kill the process of an actor that ``revives``, if it lives, and wait until it is constructed again.

        Raises: ActorFailed when it is not in time.
        """
        ...
