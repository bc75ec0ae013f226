"""Ending the processes of an engine, without vLLM: plain processes take the place of core and worker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from actors.vllm_engine import processes

WORKER = """
import time
from actors.vllm_engine.processes import start_watchdog
start_watchdog()
print("ready", flush=True)
time.sleep(100)
"""
CORE = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {WORKER!r}]); time.sleep(100)"
"""It does not end when its worker does."""
OWNER = """
import os, psutil, subprocess, sys
from actors.vllm_engine.processes import OWNER_VARIABLE, identity
environment = os.environ | {OWNER_VARIABLE: identity(psutil.Process())}
subprocess.run([sys.executable, "-c", sys.argv[1]], env=environment)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); "
    "time.sleep(100)"
)


SUBREAPER = f"""
import ctypes, subprocess, sys, time
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
subprocess.Popen([sys.executable, "-c", {OWNER!r}, sys.argv[1]])
print("adopts", flush=True)
time.sleep(100)
"""
"""It adopts the descendants of its child when that ends, as a `systemd --user` does."""


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("below", "num_descendants"), [(WORKER, 1), (CORE, 2)], ids=["worker", "core"])
def test_processes_of_an_engine_end_with_their_owner(below: str, num_descendants: int) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, below], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
    descendants = psutil.Process(owner.pid).children(recursive=True)
    assert len(descendants) == num_descendants
    time.sleep(2 * processes._WATCH_EVERY_S)
    assert all(map(processes.is_alive, descendants))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_for(lambda: not any(map(processes.is_alive, descendants)))


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_CLOSE_AFTER_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True) as stubborn:
        assert stubborn.stdout is not None and stubborn.stdout.readline() == "ready\n"
        child = next(child for child in processes.engine_processes() if child.pid == stubborn.pid)
        assert processes.is_alive(child)
        child.terminate()
        processes.end_processes([child])
        assert not processes.is_alive(child)


@pytest.mark.parametrize(("below", "num_descendants"), [(WORKER, 1), (CORE, 2)], ids=["worker", "core"])
def test_who_adopts_an_engine_lives_on(below: str, num_descendants: int) -> None:
    command = [sys.executable, "-c", SUBREAPER, below]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as subreaper:
        assert subreaper.stdout is not None
        assert {subreaper.stdout.readline(), subreaper.stdout.readline()} == {"adopts\n", "ready\n"}
        [owner] = psutil.Process(subreaper.pid).children()
        descendants = owner.children(recursive=True)
        assert len(descendants) == num_descendants
        owner.kill()
        wait_for(lambda: not any(map(processes.is_alive, descendants)))
        time.sleep(2 * processes._WATCH_EVERY_S)
        assert subreaper.poll() is None
        subreaper.kill()


@pytest.mark.parametrize("is_dead", [False, True], ids=["living", "dead"])
def test_the_family_of_an_owner_contains_what_stands_still(is_dead: bool) -> None:
    """A process that is stopped cannot end itself, and loses its parent when that dies."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, WORKER], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        owner = psutil.Process(process.pid)
        mark = processes.identity(owner)
        [worker] = owner.children()
        worker.suspend()
        if is_dead:
            process.kill()
            process.wait()
        assert processes.family(owner, mark) == [worker] if is_dead else [owner, worker]
        assert processes.family(psutil.Process(), "1 1") == []  # the id belongs to another process now
        for each in processes.family(owner, mark):
            each.kill()
        wait_for(lambda: not processes.is_alive(worker))


ADOPTER = f"""
import os, subprocess, sys, time
environment = os.environ | {{"{processes.OWNER_VARIABLE}": "1 1"}}
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], env=environment)
worker.wait()
print("ended", flush=True)
time.sleep(100)
"""
"""It is the parent of a worker whose owner has ended before the worker began to watch."""


def test_a_parent_that_is_no_engine_is_not_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ADOPTER], stdout=subprocess.PIPE, text=True) as adopter:
        assert adopter.stdout is not None
        # The worker may end before it can say that it is ready, or in the middle of the line.
        while not adopter.stdout.readline().endswith("ended\n"):
            assert adopter.poll() is None
        time.sleep(2 * processes._WATCH_EVERY_S)
        assert adopter.poll() is None
        adopter.kill()
