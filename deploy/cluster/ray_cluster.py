"""Ray for one run: a local single-node cluster of its own, or a given address.

Everything that two runs could share carries the run id: the namespace, the actors' names and
the folder in shared memory. Leaving the context ends every actor and its engine processes.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import psutil

from deploy.cluster.scope import SharedFolder, SigtermAsCtrlC
from distill.config import ClusterConfig
from distill.errors import NO_VALUE, DistillError, first_line

_END_AFTER_S = 3.0
"""How long actors and engines may take to end by themselves before Ray kills them."""
_KILL_AFTER_S = 1.5
"""How long Ray may take to kill an actor before its processes are killed from here."""


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


class Cluster:
    """A context manager: Ray is up inside it, and nothing of the run is left after it.

    SIGTERM inside it is a KeyboardInterrupt, as Ctrl-C is: job schedulers end a run by it.
    """

    def __init__(self, config: ClusterConfig, run_id: str) -> None:
        self.config = config
        self.run_id = run_id
        self._shared = SharedFolder(run_id)
        self.handles: dict[str, Any] = {}
        self.pids: dict[str, int] = {}

    def __enter__(self) -> Cluster:
        self._shared.claim()
        self._sigterm = SigtermAsCtrlC()
        # Ray reads these when it is imported. No usage report: a run tells nobody about itself.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        # An actor that fails is reported by whoever waits for it, in one line.
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        local = self.config.address is None
        ray.init(
            address="local" if local else self.config.address,
            namespace=f"distill-{self.run_id}",
            include_dashboard=False if local else None,
            object_store_memory=self.config.object_store_bytes if local else None,
            _node_ip_address=_loopback(self.run_id) if local else None,  # pyright: ignore[reportArgumentType]
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
        self._sigterm.take()  # Ray has set a handler that leaves without unwinding
        return self

    def service_pids(self) -> list[int]:
        """Processes of a local Ray itself, from which those of the actors descend."""
        return [child.pid for child in psutil.Process().children() if self.config.address is None]

    def start_actor(self, name: str, actor_class: Any, *args: object, num_threads: int) -> Any:
        """Create an actor under the run's namespace with its own thread budget."""
        import ray

        environment = {
            "OMP_NUM_THREADS": str(num_threads),
            # Idle threads sleep: spinning ones take the cores from the role whose turn it is.
            "OMP_WAIT_POLICY": "passive",
            # Freed tensors stay with the process (glibc): given back, they would be faulted in
            # again by the next pass. One arena, since each thread of a pool would otherwise keep
            # an update's gigabytes of its own.
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
            "TOKENIZERS_PARALLELISM": "false",
        }
        remote_class: Any = ray.remote(num_cpus=0)(actor_class)
        handle = remote_class.options(
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
        Raises: ActorFailed, or the actor's own DistillError, naming the actor.
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
                raise ActorFailed.late(pending.values(), timeout_s)
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
            self._shared.release()
            self._sigterm.restore()

    def _end(self, names: Sequence[str]) -> None:
        import ray

        processes = [process for name in names for process in _tree(self.pids.get(name))]
        handles = [self.handles.pop(name) for name in names if name in self.handles]
        closing = [handle.close.remote() for handle in handles if hasattr(handle, "close")]
        for name in names:
            self.pids.pop(name, None)
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_END_AFTER_S)
        for handle in handles:
            ray.kill(handle)
        # Killed at once, a process would look like a crash to Ray, which reports it on the terminal.
        _, left = psutil.wait_procs(processes, timeout=_KILL_AFTER_S)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=_END_AFTER_S)

    def _get(self, name: str, reference: Any, timeout_s: float) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(reference, timeout=timeout_s)
        except RayTaskError as error:
            cause = root_cause(error.cause if isinstance(error.cause, BaseException) else error)
            raise ActorFailed.raised(name, cause) from error
        except RayActorError as error:
            raise ActorFailed(name, NO_VALUE, f"live; it died ({first_line(error)})") from error


def _loopback(run_id: str) -> str | None:
    """A loopback address of this run's own, so that two runs never want the same port.

    All of 127/8 is loopback on Linux. Ray replaces 127.0.0.1 itself by the machine's outward
    address. Elsewhere Ray is on loopback by its own default.
    """
    if not sys.platform.startswith("linux"):
        return None
    number = int(run_id, 16)
    return f"127.{1 + number % 254}.{number // 254 % 256}.{1 + number // 65024 % 254}"


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
