"""What is set before vLLM is imported; the engines themselves are in tests/integration."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from actors.vllm_engine import startup
from actors.vllm_engine.processes import OWNER_VARIABLE, identity
from distill.errors import ConfigError


@pytest.mark.parametrize(
    ("num_threads", "ranks", "binding"),
    [(4, 1, "nobind"), (4, 2, "0,1|2,5"), (3, 2, "0|1"), (1, 3, "0|1|2"), (99, 4, "0|1|2|5")],
)
def test_ranks_share_the_usable_cores(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, ranks: int, binding: str
):
    monkeypatch.setattr(startup.os, "sched_getaffinity", lambda _: {5, 2, 1, 0})
    assert startup._thread_binding(num_threads, ranks) == binding


def test_more_ranks_than_cores_are_rejected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(startup.os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(
        ConfigError, match=r"^tensor_parallel_size=3 must be <= 2, the cores of this machine; lower it$"
    ):
        startup.set_environment(8, 3)


def test_environment_names_the_owner_and_keeps_the_user_s_choices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(startup.os, "environ", {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_CPU_KVCACHE_SPACE": "4"})
    startup.set_environment(6, 1)
    got = startup.os.environ
    assert got["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert got["OMP_NUM_THREADS"] == "6" and got["OMP_WAIT_POLICY"] == "passive"
    assert got[OWNER_VARIABLE] == identity(psutil.Process())
    assert "VLLM_CPU_KVCACHE_SPACE" not in got


def test_importing_the_engines_imports_neither_vllm_nor_torch():
    """Both read the environment, which an engine sets when it starts."""
    code = (
        "import sys, actors.vllm_engine.generator, actors.vllm_engine.teacher\n"
        "assert not {'vllm', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
