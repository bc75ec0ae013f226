"""The processes below an engine: finding them, ending them, and a watchdog that ends them with their owner.

The owner is the process that starts the engine, an actor in production.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Sequence

import psutil

OWNER_VARIABLE = "DISTILL_ENGINE_OWNER"
"""Environment variable with the owner's process id; :mod:`actors.vllm_engine.startup` sets it, and the
processes of the engine inherit it."""

_CLOSE_AFTER_S = 10.0
"""How long a process may take to end by itself before it is killed."""

_WATCH_EVERY_S = 0.5


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
    owner_id = int(os.environ.get(OWNER_VARIABLE, "0"))
    if owner_id and owner_id != os.getpid():
        threading.Thread(target=_watch, args=(owner_id,), name="distill-watchdog", daemon=True).start()


def _watch(owner_id: int) -> None:
    """End this process, and the engine core above it, when the owner or the parent has ended."""
    parent_id = os.getppid()
    try:
        owner = psutil.Process(owner_id)
        while is_alive(owner) and os.getppid() == parent_id:
            time.sleep(_WATCH_EVERY_S)
    except psutil.NoSuchProcess:
        pass
    # With several ranks the engine core is between the owner and its workers. It does not start a watchdog,
    # so a worker kills it. It belongs to the engine while it is still the worker's parent.
    if parent_id not in (1, owner_id) and os.getppid() == parent_id:
        os.kill(parent_id, signal.SIGKILL)
    os._exit(1)
