"""The learner's benchmark runs and prints its measurements."""

from __future__ import annotations

import re

import pytest

from deploy.benchmarks import learner_update


def test_benchmark_prints_a_line_per_recipe_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--student", "tiny", "--teacher-width", "64", "--texts", "2", "--length", "8", "--repeats", "1"]
    settings = ["--settings", "", "--settings", "learner.vocabulary_chunk=8"]
    assert learner_update.main([*short, "--recipes", "kd", "ammd", *settings, "--peak-tflops", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "ms an update" in line]
    assert [re.sub(r":.*", "", line).strip() for line in lines] == [
        "kd",
        "kd learner.vocabulary_chunk=8",
        "ammd",
        "ammd learner.vocabulary_chunk=8",
    ]
    for line in lines:
        assert re.search(r"[0-9]+ input tokens/s, peak .* of the peak$", line), line


def test_wrong_setting_is_one_line_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert learner_update.main(["--recipes", "ammd", "--settings", "learner.vocabulary_chunk=0"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("distill: learner.vocabulary_chunk=0 must be >= 1")


def test_operations_of_an_update() -> None:
    """Counted by hand: one layer of width 2 with an MLP of width 3, 10 inputs, 4 positions, 5 tokens in the vocabulary."""
    shape = learner_update.Shape(2, 1, 3, 1, 1, 5)
    weights = 4 * 4 + 3 * 6
    plain = 6 * weights * 10 + 4 * 5 * (6 * 2 + 2 * 7)
    assert learner_update.update_flops(shape, 7, 10, 4, learned=False) == plain
    assert learner_update.update_flops(shape, 7, 10, 4, learned=True) == plain + 2 * weights * 10 + 20 * (
        4 + 14
    )
