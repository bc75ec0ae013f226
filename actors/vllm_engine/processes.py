"""The processes below an engine: finding them, ending them, and a watchdog that ends them with their owner.

The owner is the process that starts the engine, an actor in production.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

OWNER_VARIABLE = "DISTILL_ENGINE_OWNER"
"""Environment variable with the :func:`identity` of the owner; :mod:`actors.vllm_engine.startup` sets it, and the
processes of the engine inherit it."""

_CLOSE_AFTER_S = 10.0
"""How long a process may take to end by itself before it is killed."""

_WATCH_EVERY_S = 0.5
_START_TIME = 19
"""Place of the time of creation in ``/proc/PID/stat`` after the name, which can contain spaces (proc(5), field 22)."""


def identity(process: psutil.Process) -> str:
    """The process id and the time of creation, because the system uses ids again.

    The time is in ticks since the boot, because one since 1970 changes when the machine's clock is set.

    Raises: psutil.NoSuchProcess.
    """
    if not Path("/proc/self/stat").exists():  # not Linux
        return f"{process.pid} {process.create_time()}"
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        raise psutil.NoSuchProcess(process.pid) from None
    return f"{process.pid} {fields[_START_TIME]}"


def family(owner: psutil.Process, mark: str) -> list[psutil.Process]:
    """Return a process, its descendants, and the processes of engines that it started, also when it has ended itself.

    ``mark``: its :func:`identity`. An engine core that is stopped outlives its owner, and has another parent then.
    """
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        if identity(owner) == mark:
            found = [owner, *owner.children(recursive=True)]
    return found + [each for each in psutil.process_iter() if each not in found and _owner(each) == mark]


def _owner(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(OWNER_VARIABLE)
    except (psutil.Error, OSError):
        return None


def engine_processes() -> list[psutil.Process]:
    """Return the descendants of this process, without multiprocessing's resource tracker."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "resource_tracker" not in "".join(_command_line(child))
    ]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def first_deaths(processes: Sequence[psutil.Process]) -> str:
    """Wait until one of the processes has ended; returns the ids of those that have."""
    while all(map(is_alive, processes)):
        await asyncio.sleep(_WATCH_EVERY_S)
    return ", ".join(str(process.pid) for process in processes if not is_alive(process))


def end_processes(processes: Sequence[psutil.Process]) -> None:
    """Wait for processes that are shutting down, and kill those that take too long."""
    _, alive = psutil.wait_procs(processes, timeout=_CLOSE_AFTER_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=_CLOSE_AFTER_S)


def start_watchdog() -> None:
    """Watch the owner from a thread of this process. Does nothing in the owner and without an owner."""
    mark = os.environ.get(OWNER_VARIABLE)
    if mark is not None and mark != identity(psutil.Process()):
        threading.Thread(target=_watch, args=(mark,), name="distill-watchdog", daemon=True).start()


def _watch(mark: str) -> None:
    """End this process, and the engine core above it, when the owner or the parent has ended."""
    parent_id = os.getppid()
    with suppress(psutil.NoSuchProcess):
        owner = psutil.Process(int(mark.split()[0]))
        while identity(owner) == mark and is_alive(owner) and os.getppid() == parent_id:
            time.sleep(_WATCH_EVERY_S)
    # With several ranks the engine core is between the owner and its workers. It does not start a watchdog,
    # so a worker kills it. A process that adopted this one after its parent's death has no such mark.
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(parent_id)
        if _owner(parent) == mark and os.getppid() == parent_id:
            parent.kill()
    os._exit(1)
