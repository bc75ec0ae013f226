"""Tables and answers as text; model text cannot do anything but be read."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deploy.report.text import LABELS, before_after_table, plain_text, strip_control, three_answers
from distill.evaluation import METRICS, Estimate


def summary(tv: float, length: float, rouge: float | None = 0.2) -> dict:
    divergences = {"tv": tv, "forward_kl": 0.5, "reverse_kl": 0.6, "jsd": 0.1}
    return {
        "teacher_text": divergences,
        "student_text": divergences,
        "rouge_l": {"teacher": rouge, "reference": 0.3},
        "entropy": 1.25,
        "length": length,
        "num_prompts": 128,
        "stderr": dict.fromkeys(METRICS, 0.01),
    }


def lines_of(paired: dict) -> dict[str, str]:
    text = plain_text(before_after_table(summary(0.365, 40.0, None), summary(0.295, 44.0), paired))
    assert text.isprintable() or set(text) - set("\n") == {c for c in text if c.isprintable()}
    return {name: line for line in text.splitlines() for name in METRICS if f" {LABELS[name]} " in line}


def test_values_differences_and_verdicts():
    lines = lines_of(
        {
            "teacher_text.tv": Estimate(-0.07, 0.0012),
            "student_text.tv": [0.05, 0.001],  # as it comes out of summary.json
            "rouge_l.reference": Estimate(0.1, 0.01),
            "teacher_text.forward_kl": Estimate(-0.01, 0.008),
            "length": Estimate(4.0, 0.5),
            "entropy": Estimate(0.1, float("nan")),
        }
    )
    assert set(lines) == set(METRICS)
    tv = lines["teacher_text.tv"]
    for part in ("0.3650 ± 0.0100", "0.2950 ± 0.0100", "-0.0700 ± 0.0012", "↓ better"):
        assert part in tv
    assert "↑ worse" in lines["student_text.tv"]
    assert "↑ better" in lines["rouge_l.reference"]
    assert "within the noise" in lines["teacher_text.forward_kl"]
    assert "↑ changed" in lines["length"]
    assert "44.00 ± 0.01" in lines["length"]
    assert "not measured" in lines["rouge_l.teacher"]
    assert not any(word in lines["entropy"] for word in ("better", "worse", "changed", "noise"))


def test_the_table_survives_json_and_a_terminal():
    before, after = (json.loads(json.dumps(summary(tv, 40.0))) for tv in (0.3, 0.2))
    table = before_after_table(before, after, {"teacher_text.tv": [-0.1, 0.01]})
    console = Console(force_terminal=True, record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    assert "better" in console.export_text()


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;own your title\x07after", "after"),
        ("\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\", "click"),
        ("\x9b2Jgone", "gone"),
        ("\x90payload\x9cafter", "after"),
        ("\x1bPpayload\x1b\\after", "after"),
        ("\x1bcreset", "reset"),
        ("\x1b(0line drawing", "line drawing"),
        ("over\rwrite\x08\x7f\x00", "overwrite"),
        ("unfinished \x1b]52;c;xyz", "unfinished ]52;c;xyz"),
        ("\x1b\x1b[0m[31mnested", "[31mnested"),
        ("a\u202eb\u2066c\U000e0041", "abc"),
        ("half \ud800 pair", "half \ufffd pair"),
        ("two\u2028lines\r\nand\ttab", "two\nlines\nand\ttab"),
        ("日本語 é 👩‍💻 [bold]", "日本語 é 👩‍💻 [bold]"),
    ],
)
def test_control_sequences_go_and_text_stays(hostile, shown):
    assert strip_control(hostile) == shown


@given(st.text(st.sampled_from("\x1b[]P\\;0m1\x07\x9b\x9c\x90\r\n\ta\u202e\u200dX"), max_size=30) | st.text())
def test_nothing_that_a_terminal_obeys_is_left(text):
    shown = strip_control(text)
    assert all(
        c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for c in shown
    )
    assert strip_control(shown) == shown
    shown.encode()


def test_answers_stand_behind_a_bar():
    text = three_answers(["Why?"], ["Because\n  student after\nforged"], ["\x1b[2Jno"], ["[red]yes[/red]"])
    assert text.splitlines() == [
        "prompt 1",
        "  | Why?",
        "  teacher",
        "  | Because",
        "  |   student after",
        "  | forged",
        "  student before",
        "  | no",
        "  student after",
        "  | [red]yes[/red]",
    ]
    with pytest.raises(ValueError, match="zip"):
        three_answers(["a", "b"], ["a"], ["a"], ["a"])
