"""Concurrent processes: their order, cores and failures; none outlives its caller."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from deploy.study.processes import Command, ProcessFailed, core_shares, run_all

PRINT_CORES = "import os, time; time.sleep(0.3); print(sorted(os.sched_getaffinity(0)))"
WAIT = "import time; time.sleep(60)"


def python(tmp_path: Path, name: str, code: str) -> Command:
    return Command(name, (sys.executable, "-c", code), tmp_path / "logs" / f"{name}.txt")


def children_with(code: str) -> list[psutil.Process]:
    return [process for process in psutil.Process(os.getpid()).children() if code in process.cmdline()]


def test_each_process_runs_on_its_share_of_the_cores(tmp_path: Path):
    commands = [python(tmp_path, str(i), PRINT_CORES) for i in range(3)]
    ended = []
    run_all(commands, 2, lambda command, seconds: ended.append((command.name, seconds > 0.2)))
    assert sorted(ended) == [("0", True), ("1", True), ("2", True)]
    shares = [str(cores) for cores in core_shares(2)]
    printed = [command.log.read_text().strip() for command in commands]
    assert printed[:2] == shares and printed[2] in shares


def test_shares_partition_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 8})
    assert core_shares(1) == [[2, 3, 5, 7, 8]]
    assert core_shares(2) == [[2, 3], [5, 7, 8]]
    assert core_shares(7) == [[2], [3], [5], [7], [8], [2], [3]]


def test_the_first_failure_ends_the_other_processes(tmp_path: Path):
    fails = python(tmp_path, "fails", "print('why'); raise SystemExit(3)")
    with pytest.raises(
        ProcessFailed,
        match=r"^exit code of fails=3 must be 0 \(why\); read its output in \S*logs/fails\.txt$",
    ):
        run_all([python(tmp_path, "waits", WAIT), fails], 2)
    assert not children_with(WAIT)


def test_sigterm_ends_all_processes(tmp_path: Path):
    child = "import os, signal, time; time.sleep(0.5); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all([python(tmp_path, "child", child), python(tmp_path, "other", WAIT)], 2)
    assert time.monotonic() - began < 30
    assert not children_with(child) and not children_with(WAIT)


def test_a_failure_that_counts_as_a_result(tmp_path: Path):
    fails = python(tmp_path, "fails", "raise SystemExit(3)")
    ended: list[str] = []
    run_all([replace(fails, may_fail=lambda: True)], 1, lambda command, _: ended.append(command.name))
    assert ended == ["fails"]


def test_before_start_can_stop_the_remaining_commands(tmp_path: Path):
    started: list[int] = []

    def before_start() -> None:
        if started:
            raise RuntimeError("the code has changed")
        started.append(1)

    with pytest.raises(RuntimeError, match="the code has changed"):
        run_all([python(tmp_path, "one", WAIT), python(tmp_path, "two", WAIT)], 2, before_start=before_start)
    assert started == [1]
    assert not children_with(WAIT)
