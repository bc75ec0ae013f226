"""MKL's vector functions are settled before a model computes with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actors import transformers_engine
from distill.config import ScoringConfig
from distill.machine.vector_math import FUNCTIONS, settle_vector_math
from learner.model.student import Student
from tests.tiny import save_tiny_llama

STORM = """
import os, torch
from distill.machine.vector_math import settle_vector_math
torch.set_num_threads(1)  # no thread pool before the fork, which it would not survive
numbers = torch.rand(512, 512) * 0.9 + 0.05
differ = 0
for name in ("exp", "sqrt", "log"):
    for _ in range(25):
        if (child := os.fork()) == 0:
            torch.set_num_threads(2)
            settle_vector_math()
            first, second = (getattr(torch, name)(numbers) for _ in range(2))
            os._exit(int(not torch.equal(first, second)))
        differ += os.waitpid(child, 0)[1] != 0
print(differ)
"""


def test_the_first_call_of_a_process_returns_the_same_numbers_as_the_second() -> None:
    """Runs seventy-five processes of two threads.

    Without settling, some of them return different numbers on a busy machine with AVX-512. Without AVX-512,
    all 15,000 that were tried returned the same.
    """
    done = subprocess.run(
        [sys.executable, "-c", STORM], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "0"


@pytest.fixture
def unsettled() -> None:
    settle_vector_math.cache_clear()


@pytest.mark.usefixtures("unsettled")
def test_loading_a_model_settles_them_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_llama(tmp_path)
    settled: list[str] = []

    class Loader:
        @staticmethod
        def from_pretrained(*arguments: object, **settings: object) -> object:
            settled.append("engine" if settle_vector_math.cache_info().currsize else "too late")
            raise RuntimeError("seen")

    with pytest.raises(RuntimeError, match="seen"):
        transformers_engine._load(Loader, str(folder), ScoringConfig())
    settle_vector_math.cache_clear()
    monkeypatch.setattr("learner.model.student.AutoModelForCausalLM", Loader)
    with pytest.raises(RuntimeError, match="seen"):
        Student(folder)
    assert settled == ["engine", "engine"]


@pytest.mark.usefixtures("unsettled")
def test_each_function_is_called_in_both_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    called: list[tuple[str, torch.dtype, int]] = []
    for name in FUNCTIONS:

        def record(value: torch.Tensor, name: str = name) -> torch.Tensor:
            called.append((name, value.dtype, value.numel()))
            return value

        monkeypatch.setattr(torch, name, record)
    settle_vector_math()
    assert sorted(called, key=str) == sorted(
        [(name, dtype, 1) for name in FUNCTIONS for dtype in (torch.float32, torch.float64)], key=str
    )
