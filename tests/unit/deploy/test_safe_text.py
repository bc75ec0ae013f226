"""Text from a model can be read, and can do nothing else."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.safe_text import strip_control


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
def test_control_sequences_are_removed_and_text_stays(hostile, shown):
    assert strip_control(hostile) == shown


@given(st.text(st.sampled_from("\x1b[]P\\;0m1\x07\x9b\x9c\x90\r\n\ta\u202e\u200dX"), max_size=30) | st.text())
def test_nothing_that_a_terminal_obeys_remains(text):
    shown = strip_control(text)
    assert all(
        c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for c in shown
    )
    assert strip_control(shown) == shown
    shown.encode()
