"""The learner's benchmark runs, and says what it measured."""

from __future__ import annotations

import re

import pytest

from deploy.benchmarks import learner_update


def test_a_line_per_recipe_and_setting(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_mistake_is_one_line_before_anything_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert learner_update.main(["--recipes", "ammd", "--settings", "learner.vocabulary_chunk=0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("distill: learner.vocabulary_chunk=0 must be >= 1")


def test_what_an_update_cannot_do_without() -> None:
    """By hand: one layer of width 2 and a square key, value and MLP of width 3, 10 inputs, 4 positions of 5 tokens."""
    shape = learner_update.Shape(2, 1, 3, 1, 1, 5)
    weights = 4 * 4 + 3 * 6
    plain = 6 * weights * 10 + 4 * 5 * (6 * 2 + 2 * 7)
    assert learner_update.update_flops(shape, 7, 10, 4, learned=False) == plain
    assert learner_update.update_flops(shape, 7, 10, 4, learned=True) == plain + 2 * weights * 10 + 20 * (
        4 + 14
    )
