"""Ray for one run: a local single-node cluster of its own, or a given address.

Everything that two runs could share carries the run id: the namespace, the actors' names and
the folder in shared memory. Leaving the context ends every actor and its engine processes.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import psutil

from distill.config import ClusterConfig
from distill.run_inputs import shared_memory_root

_END_AFTER_S = 5.0
"""How long actors and engines may take to end by themselves before they are killed."""


class ActorFailed(RuntimeError):
    """An actor raised or died; the message names it and what it said last."""


class Cluster:
    """A context manager: Ray is up inside it, and nothing of the run is left after it."""

    def __init__(self, config: ClusterConfig, run_id: str) -> None:
        self.config = config
        self.run_id = run_id
        self.handles: dict[str, Any] = {}
        self.pids: dict[str, int] = {}

    def __enter__(self) -> Cluster:
        # Ray reads these when it is imported. No usage report: a run tells nobody about itself.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        local = self.config.address is None
        ray.init(
            address="local" if local else self.config.address,
            namespace=f"distill-{self.run_id}",
            include_dashboard=False if local else None,
            object_store_memory=self.config.object_store_bytes if local else None,
            _node_ip_address="127.0.0.1" if local else None,  # pyright: ignore[reportArgumentType]
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
        return self

    def start_actor(self, name: str, actor_class: Any, *args: object, num_threads: int) -> Any:
        """Create an actor under the run's namespace with its own thread budget."""
        import ray

        environment = {"OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}
        handle = actor_class.options(
            name=name, runtime_env={"env_vars": environment}, max_concurrency=1000
        ).remote(*args)
        self.handles[name] = handle
        self.pids[name] = self._get(name, handle.pid.remote(), self.config.start_timeout_s)
        return ray.get_actor(name)

    def wait(
        self,
        work: dict[str, Any],
        *,
        tick: Callable[[], None] = lambda: None,
        interval_s: float = 1.0,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Wait for one call per actor, ticking meanwhile; the first failure ends the wait.

        ``work``: actor name -> object reference. Returns the results by name.
        Raises: ActorFailed naming the actor; TimeoutError.
        """
        import ray

        pending = {reference: name for name, reference in work.items()}
        results: dict[str, Any] = {}
        start = time.monotonic()
        while pending:
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=interval_s)
            if not done and pending:
                done, _ = ray.wait(list(pending), num_returns=1, timeout=0)
            for reference in done:
                name = pending.pop(reference)
                results[name] = self._get(name, reference, 60.0)
            tick()
            if timeout_s is not None and pending and time.monotonic() - start > timeout_s:
                raise ActorFailed(
                    f"{', '.join(sorted(pending.values()))} did not answer within {timeout_s:.0f} s "
                    "(cluster.start_timeout_s); raise it, or look at the actors' logs under /tmp/ray"
                )
        return results

    def poll(self, reference: Any, timeout_s: float = 2.0) -> Any | None:
        """The value of a reference if it comes in time, else None."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(reference, timeout=timeout_s)
        except RayError:
            return None

    def end_actor(self, name: str) -> None:
        """Close an actor and kill it with all its processes."""
        self._end([name])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        import ray

        try:
            self._end(list(self.handles))
        finally:
            ray.shutdown()
            shutil.rmtree(shared_memory_root() / f"distill-{self.run_id}", ignore_errors=True)

    def _end(self, names: Sequence[str]) -> None:
        import ray

        processes = [process for name in names for process in _tree(self.pids.get(name))]
        closing = []
        for name in names:
            handle = self.handles.pop(name, None)
            if handle is not None and hasattr(handle, "close"):
                closing.append(handle.close.remote())
            if handle is not None:
                self.pids.pop(name, None)
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_END_AFTER_S)
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=_END_AFTER_S)

    def _get(self, name: str, reference: Any, timeout_s: float) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(reference, timeout=timeout_s)
        except RayTaskError as error:
            cause = root_cause(error.cause if isinstance(error.cause, BaseException) else error)
            raise ActorFailed(f"{name}: {type(cause).__name__}: {cause}") from error
        except RayActorError as error:
            raise ActorFailed(f"{name} died: {str(error).splitlines()[0]}") from error


def root_cause(error: BaseException) -> BaseException:
    """The first failure inside groups and chains: what the user has to know."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif getattr(error, "cause", None) is not None and isinstance(error.cause, BaseException):  # pyright: ignore
            error = error.cause  # pyright: ignore[reportAttributeAccessIssue]
        else:
            return error


def _tree(pid: int | None) -> list[psutil.Process]:
    """A process and its descendants, deepest last; none when it is gone or was never known."""
    if pid is None:
        return []
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
