"""What a study's runs are named by, and how they end with it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.study import runner


def test_a_terminated_study_ends_the_run_it_waits_for(tmp_path: Path):
    child = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    began = time.monotonic()
    with open(tmp_path / "log.txt", "w") as output, pytest.raises(KeyboardInterrupt):
        runner._run([sys.executable, "-c", child], output)
    assert time.monotonic() - began < 30
    assert not [process for process in psutil.Process(os.getpid()).children() if child in process.cmdline()]


def test_an_exit_code_is_handed_on(tmp_path: Path):
    with open(tmp_path / "log.txt", "w") as output:
        assert runner._run([sys.executable, "-c", "print('x'); raise SystemExit(3)"], output) == 3
    assert (tmp_path / "log.txt").read_text() == "x\n"


def test_the_methods_hash_sees_its_code(monkeypatch: pytest.MonkeyPatch):
    whole = runner.method_hash()
    assert whole == runner.method_hash()
    monkeypatch.setattr(runner, "METHOD_CODE", runner.METHOD_CODE[:-1])
    assert runner.method_hash() != whole
