"""Processes side by side, each on cores of its own; none outlives the caller's Ctrl-C or SIGTERM."""

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
"""How long an interrupted process may take to end by itself."""
_POLL_S = 0.2


class ProcessFailed(DistillError, RuntimeError):
    """A process ended with a code that it must not; the message names it and where its output is."""


@dataclass(frozen=True)
class Command:
    """What is run."""

    name: str
    argv: tuple[str, ...]
    log: Path
    """Where its output goes."""
    may_fail: Callable[[], bool] = lambda: False
    """Asked after another code than 0: whether that is a result too."""


@dataclass(frozen=True)
class _Running:
    command: Command
    process: subprocess.Popen[bytes]
    cores: list[int]
    since: float


def core_shares(num_jobs: int) -> list[list[int]]:
    """This process's cores in ``num_jobs`` nearly equal parts; with more jobs than cores they share."""
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
    """Run commands in order, ``num_jobs`` at a time; ``on_end`` is told each one's seconds.

    Raises: ProcessFailed with the first that fails; what ``on_end`` or ``before_start`` raise. The others are ended.
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
    with contextlib.suppress(ProcessLookupError):  # it may have ended already
        os.sched_setaffinity(process.pid, cores)  # before it counts its cores
    return _Running(command, process, cores, time.monotonic())


def _check(one: _Running) -> None:
    code = one.process.returncode
    if code != 0 and not one.command.may_fail():
        lines = one.command.log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
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
