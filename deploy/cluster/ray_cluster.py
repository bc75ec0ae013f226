"""Actors as processes of Ray: a local cluster that serves one run, or one node of the cluster at an address.

The run id is part of everything that two runs could share: the namespace of the actors' names, and the
folder in shared memory. Leaving the context ends every actor with its engine processes.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from actors.replay_client import is_gone
from actors.vllm_engine.processes import family, identity, is_alive
from deploy.cluster.address import head_address, probe
from deploy.cluster.backend import Backend
from deploy.cluster.failures import ActorFailed, ActorGone, BackendEnded
from deploy.cluster.scope import SharedFolder, SigtermAsCtrlC
from deploy.job import JOB_VARIABLE, in_uploaded_folder
from deploy.placement import Node
from distill.config import ClusterConfig
from distill.errors import NO_VALUE, first_line
from distill.machine.container import num_killed

_END_AFTER_S = 3.0
"""Time that actors and engines have to end by themselves before Ray kills them."""
_KILL_AFTER_S = 1.5
"""Time that Ray has to kill an actor before the driver kills its processes."""
_REVIVE_EVERY_S = 0.2
"""Time between two questions to an actor that is being constructed again."""
_RESULT_TIMEOUT_S = 60.0
"""Time for fetching the result of a call that has returned."""
_LOOK_EVERY_S = 5.0
"""Time between two looks at whether Ray lives while a call to an actor is awaited: without Ray it never returns."""
_NEEDED = ("gcs_server", "raylet")
_LOGS = "/tmp/ray"
"""Where Ray writes what its actors print."""


def actor_environment(num_threads: int) -> dict[str, str]:
    """Return the environment variables with which the process of an actor starts."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        # Idle threads sleep, because spinning ones take the cores from the actor that works.
        "OMP_WAIT_POLICY": "passive",
        # glibc keeps the memory of freed tensors, because the next pass would fault returned pages
        # in again. There is one arena, because otherwise each thread of a pool keeps gigabytes.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        "TOKENIZERS_PARALLELISM": "false",
    }


class RayCluster(Backend):
    """A :class:`Backend` that runs Ray while the context is open.

    SIGTERM raises KeyboardInterrupt meanwhile, because job schedulers end a run by that signal.
    """

    def __init__(self, config: ClusterConfig, run_id: str) -> None:
        self._config = config
        self._head = head_address(config)
        self._run_id = run_id
        self._shared = SharedFolder(run_id)
        self._handles: dict[str, Any] = {}
        self._ending = threading.RLock()
        self._processes: dict[str, tuple[psutil.Process, str]] = {}
        """Of the actors, with their identity: the system uses pids again."""
        self._services: dict[psutil.Process, str] = {}
        """The processes of a local Ray that it cannot do without, with their programs."""
        self._stopped: dict[psutil.Process, float] = {}
        """When one of them was first found standing still."""
        self._num_killed = num_killed() or 0
        """Processes that had been killed for lack of memory when an actor was last found dead."""

    def __enter__(self) -> Self:
        if self._head is not None:
            self._probed = probe(self._head)  # before ray.init, which retries for a minute
        self._shared.claim()
        self._sigterm = SigtermAsCtrlC()
        # Ray reads these when it is imported. The first one turns usage reports off.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        # The run reports the failure of an actor, in one line.
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        # Ray's debugger sets it for the same purpose; `log_to_driver` does not cover what a raylet says of dead workers.
        ray._private.worker._worker_logs_enabled = False  # pyright: ignore
        local = self._head is None
        if local:  # a job's files are in its own cluster, where a Ray that the job starts cannot find them
            os.environ.pop(JOB_VARIABLE, None)
        ray.init(
            address="local" if self._head is None else self._head.value,
            namespace=f"distill-{self._run_id}",
            include_dashboard=False if local else None,
            object_store_memory=self._config.object_store_bytes if local else None,
            _node_ip_address=_loopback(self._run_id) if local else None,  # pyright: ignore[reportArgumentType]
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
        self._sigterm.take()  # Ray has installed a handler that exits without unwinding
        if local:
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):  # Ray starts helpers that end soon
                    if (name := child.name()) in _NEEDED:
                        self._services[child] = name
        return self

    def service_pids(self) -> list[int]:
        """A local Ray's own processes, which are the parents of those of the actors."""
        return [child.pid for child in psutil.Process().children() if self._head is None]

    def require_life(self) -> None:
        for process, name in self._services.items():
            try:
                stands_still = process.status() == psutil.STATUS_STOPPED
            except psutil.NoSuchProcess:
                raise BackendEnded.process(name, process.pid) from None
            if stands_still:
                self._note_stopped(process, name)
            elif not is_alive(process):
                raise BackendEnded.process(name, process.pid)
            else:
                self._stopped.pop(process, None)

    def _note_stopped(self, process: psutil.Process, name: str) -> None:
        """Kill a process of a local Ray that has stood still for too long, so that calls which wait for it fail.

        Raises: BackendEnded, if it did.
        """
        now = time.monotonic()
        seconds = now - self._stopped.setdefault(process, now)
        if seconds > self._config.beat_timeout_s:
            process.kill()
            raise BackendEnded.stopped(name, process.pid, seconds)

    def node(self) -> Node | None:
        import ray
        from ray._private.state import available_resources_per_node

        if self._head is None:
            return None
        free = available_resources_per_node().get(ray.get_runtime_context().get_node_id(), {})
        return replace(self._probed, free_cpus=free.get("CPU", 0.0), free_gpus=free.get("GPU", 0.0))

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
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        environment = actor_environment(num_threads)
        options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        if revives:
            options["max_restarts"] = -1
        if self._head is not None:
            # Ray hides the devices that an actor has not taken, also from an actor that has taken none.
            environment["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "1"
            if not in_uploaded_folder():  # the head's Python need not find what this driver runs
                environment["PYTHONPATH"] = _python_path()
            here = ray.get_runtime_context().get_node_id()
            # Rows and weights pass through the shared memory of one node.
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
        remote_class: Any = ray.remote(**options)(actor_class)
        handle = remote_class.options(
            name=name, runtime_env={"env_vars": environment}, max_concurrency=1000
        ).remote(*args)
        self._handles[name] = handle
        try:
            pid = self._get(name, handle.pid.remote(), self._config.start_timeout_s)
        except Exception:
            self.kill_actor(name)
            raise
        self._know(name, pid)
        return ray.get_actor(name)

    def _know(self, name: str, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            self._processes[name] = process, identity(process)
        except psutil.NoSuchProcess as error:
            raise ActorGone.died(name, "it has just ended") from error

    def metrics_address(self) -> str | None:
        """Where Ray's agent on this node publishes the numbers of its processes; None if it does not."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        for node in ray.nodes():
            if node["NodeID"] == here and node.get("MetricsExportPort", 0) > 0:
                return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        return None

    def actor_pid(self, name: str) -> int | None:
        process, _ = self._processes[name]
        return process.pid

    def wait(
        self,
        calls: dict[str, Any],
        *,
        tick: Callable[[], None] = lambda: None,
        interval_s: float = 1.0,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        import ray

        pending = {call: name for name, call in calls.items()}
        results: dict[str, Any] = {}
        start = time.monotonic()
        while pending:
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=interval_s)
            if not done and pending:
                done, _ = ray.wait(list(pending), num_returns=1, timeout=0)
            for call in done:
                name = pending.pop(call)
                results[name] = self._get(name, call, _RESULT_TIMEOUT_S)
            self.require_life()
            tick()
            if timeout_s is not None and pending and time.monotonic() - start > timeout_s:
                raise ActorGone.late(pending.values(), timeout_s, logs=_LOGS)
        return results

    def poll(self, call: Any, timeout_s: float = 2.0) -> Any | None:
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(call, timeout=timeout_s)
        except RayError:
            return None

    def end_actor(self, name: str) -> None:
        self._end([name])

    def kill_actor(self, name: str, pid: int | None = None) -> None:
        with self._ending:  # two threads may have noticed that it is to be killed
            known = self._processes.get(name)
            if pid is None or (known is not None and known[0].pid == pid):
                self._end([name], ask=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import ray

        try:
            self._end(list(self._handles))
        finally:
            ray.shutdown()
            self._shared.release()
            self._sigterm.restore()

    def revive_actor(self, name: str) -> None:
        for process in family(*self._processes[name]):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        end = time.monotonic() + self._config.start_timeout_s
        while True:  # Ray needs a moment to notice
            try:
                pid = self._get(name, self._handles[name].pid.remote(), self._config.start_timeout_s)
                break
            except BackendEnded:
                raise
            except ActorFailed:
                if time.monotonic() > end:
                    raise
                time.sleep(_REVIVE_EVERY_S)
        self._know(name, pid)

    def _end(self, names: Sequence[str], *, ask: bool = True) -> None:
        """End actors with the processes of their engines. ``ask``: let them close their engines first."""
        import ray

        known = [self._processes.pop(name) for name in names if name in self._processes]
        processes = [each for process, mark in known for each in family(process, mark)]
        handles = [self._handles.pop(name) for name in names if name in self._handles]
        closing = [handle.close.remote() for handle in handles if ask and hasattr(handle, "close")]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_END_AFTER_S)
        for handle in handles:
            ray.kill(handle)
        # Killing a process at once would look like a crash to Ray, which prints crashes to the terminal.
        _, left = psutil.wait_procs(processes, timeout=_KILL_AFTER_S)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=_END_AFTER_S)

    def failure(self, name: str, error: BaseException) -> Exception:
        from ray.exceptions import RayActorError, RayError, RayTaskError

        if isinstance(error, RayActorError) and error.actor_init_failed:
            # Ray keeps the error only as text, whose last line names it.
            cause = str(error).splitlines()[-1].strip()
            return ActorFailed(name, NO_VALUE, f"finish its work; it raised {cause}")
        if is_gone(error):
            return ActorGone.died(name, first_line(error), num_killed=self._newly_killed(error))
        if isinstance(error, RayError) and not isinstance(error, RayTaskError):
            # Ray cannot prepare the job's files on the node.
            return ActorFailed(name, NO_VALUE, f"start; Ray reports: {first_line(error)}")
        return ActorFailed.raised(name, error)

    def _newly_killed(self, error: BaseException) -> int:
        """How many processes have run out of memory since the last call: by the kernel's count, or Ray's word for this one.

        Ray kills an actor before the kernel does, where it can.
        """
        from ray.exceptions import OutOfMemoryError

        known, self._num_killed = self._num_killed, num_killed() or 0
        by_ray = isinstance(error, OutOfMemoryError) or "memory pressure" in str(error)
        return max(self._num_killed - known, int(by_ray))

    def _get(self, name: str, call: Any, timeout_s: float) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        end = time.monotonic() + timeout_s
        while True:
            try:
                return ray.get(call, timeout=max(0.0, min(_LOOK_EVERY_S, end - time.monotonic())))
            except GetTimeoutError as error:
                self.require_life()
                if time.monotonic() >= end:
                    raise ActorGone.late([name], timeout_s, logs=_LOGS) from error
            except RayError as error:
                raise self.failure(name, error) from error


def _python_path() -> str:
    """The folder of this project's packages, before what this process has in PYTHONPATH."""
    known = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(Path(__file__).parents[2]), *([known] if known else [])])


def _loopback(run_id: str) -> str | None:
    """A loopback address that only this run uses, so that two runs never need the same port.

    All of 127/8 is loopback on Linux. The address is never 127.0.0.1, which Ray replaces by the machine's
    outward address. On other systems Ray listens on loopback by default.
    """
    if not sys.platform.startswith("linux"):
        return None
    number = int(run_id, 16)
    return f"127.{1 + number % 254}.{number // 254 % 256}.{1 + number // 65024 % 254}"
