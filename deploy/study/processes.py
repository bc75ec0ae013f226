"""Runs processes concurrently, each on its own cores; none outlives a Ctrl-C or SIGTERM of the caller."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.cluster.scope import SigtermAsCtrlC
from distill.errors import DistillError

_END_AFTER_S = 15.0
"""How long an interrupted process has to end by itself before it is killed."""
_POLL_S = 0.2


class ProcessFailed(DistillError, RuntimeError):
    """A process ended with an unexpected exit code; the message names it and the file of its output."""

    code = "process"


@dataclass(frozen=True)
class Command:
    """A process to run."""

    name: str
    argv: tuple[str, ...]
    log: Path
    """The file for its output."""
    may_fail: Callable[[], bool] = lambda: False
    """Called after a non-zero exit code: whether that is a valid result."""


@dataclass(frozen=True)
class _Running:
    command: Command
    process: subprocess.Popen[bytes]
    cores: list[int]
    since: float


def core_shares(num_jobs: int) -> list[list[int]]:
    """This process's cores in ``num_jobs`` nearly equal parts; with more jobs than cores, jobs share cores."""
    cores = sorted(os.sched_getaffinity(0))
    if num_jobs >= len(cores):
        return [[cores[i % len(cores)]] for i in range(num_jobs)]
    return [cores[i * len(cores) // num_jobs : (i + 1) * len(cores) // num_jobs] for i in range(num_jobs)]


def run_all(
    commands: Sequence[Command],
    num_jobs: int,
    on_end: Callable[[Command, float], None] = lambda *_: None,
    before_start: Callable[[], None] = lambda: None,
) -> None:
    """Run commands in order, ``num_jobs`` at a time.

    ``on_end`` receives each command and its seconds; ``before_start`` is called before each start.

    Raises: ProcessFailed for the first command that fails; whatever ``on_end`` and ``before_start`` raise.
    In either case the other processes are terminated.
    """
    waiting, free = deque(commands), core_shares(num_jobs)
    running: list[_Running] = []
    sigterm = SigtermAsCtrlC()
    try:
        while waiting or running:
            while waiting and free:
                before_start()
                running.append(_start(waiting.popleft(), free.pop(0)))
            time.sleep(_POLL_S)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.cores)
                _check(one)
                on_end(one.command, time.monotonic() - one.since)
    finally:
        _end([one.process for one in running])
        sigterm.restore()


def _start(command: Command, cores: list[int]) -> _Running:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with open(command.log, "wb") as output:
        process = subprocess.Popen(command.argv, stdout=output, stderr=subprocess.STDOUT)
    with contextlib.suppress(ProcessLookupError):  # the process may have ended already
        os.sched_setaffinity(process.pid, cores)  # before the process counts its cores
    return _Running(command, process, cores, time.monotonic())


def _check(one: _Running) -> None:
    code = one.process.returncode
    if code != 0 and not one.command.may_fail():
        lines = one.command.log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        raise ProcessFailed(
            f"exit code of {one.command.name}",
            code,
            f"be 0 ({last})",
            f"read its output in {one.command.log}",
        )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _END_AFTER_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
