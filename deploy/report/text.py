"""Results as text: the before/after table and sample answers, for a terminal or a log file.

Model text is hostile: whatever the model wrote is stripped of control sequences before it is
shown, and never parsed as markup.
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from distill.evaluation import METRICS, direction

LABELS = {
    "teacher_text.tv": "TV, teacher's text",
    "teacher_text.forward_kl": "forward KL, teacher's text",
    "teacher_text.reverse_kl": "reverse KL, teacher's text",
    "teacher_text.jsd": "JSD, teacher's text",
    "student_text.tv": "TV, student's text",
    "student_text.forward_kl": "forward KL, student's text",
    "student_text.reverse_kl": "reverse KL, student's text",
    "student_text.jsd": "JSD, student's text",
    "rouge_l.teacher": "ROUGE-L with the teacher",
    "rouge_l.reference": "ROUGE-L with the reference",
    "entropy": "student's entropy",
    "length": "response tokens",
}

SIGNIFICANT = 2.0
"""Standard errors that a difference must exceed to be called better or worse."""

# Whole sequences, so that their parameters go too: CSI; OSC, DCS, SOS, PM, APC up to their
# terminator; other escapes. What is left of unfinished ones is harmless without its ESC.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-Z\\^-~]"
)
_JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need; all others (direction marks, tags) can deceive."""


def strip_control(text: str) -> str:
    """Text that cannot move the cursor, colour, retitle, re-order or hide: lines and tabs stay."""
    text = _SEQUENCE.sub("", text.replace("\r\n", "\n"))
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    category = unicodedata.category(character)
    if category in ("Zl", "Zp"):
        return "\n"
    if category == "Cs":  # half of a surrogate pair: cannot be encoded
        return "\ufffd"
    return "" if category in ("Cc", "Cf") else character


def before_after_table(
    before: Mapping[str, Any], after: Mapping[str, Any], paired: Mapping[str, Any]
) -> Table:
    """A row per metric: before, after, and the difference paired by prompt.

    ``before`` and ``after``: ``Evaluation.to_dict()``; ``paired``: metric -> (difference,
    standard error), from ``paired_difference``; a metric may be missing in it.
    """
    table = Table(title=f"before and after, {after['num_prompts']} held-out prompts", title_justify="left")
    table.add_column("metric")
    for name in ("before", "after", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for metric in METRICS:
        difference, stderr = paired.get(metric) or (None, None)
        words, style = _verdict(metric, difference, stderr)
        table.add_row(
            Text(LABELS[metric]),
            _estimate(metric, _value(before, metric), before["stderr"].get(metric)),
            _estimate(metric, _value(after, metric), after["stderr"].get(metric)),
            _estimate(metric, difference, stderr, signed=True),
            Text(words, style=style),
        )
    table.caption = (
        "TV: total variation; KL and entropy in nats per token; ROUGE-L: F1 in 0-1. "
        "± one standard error over prompts; the difference's is paired by prompt. "
        f"Better or worse: more than {SIGNIFICANT:g} standard errors."
    )
    table.caption_justify = "left"
    return table


def three_answers(
    prompts: Sequence[str], teacher: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> str:
    """Each prompt with the teacher's, the first and the last student's answer.

    Model text stands behind a bar, so it cannot pass for one of the headings.
    """
    parts = []
    for number, texts in enumerate(zip(prompts, teacher, before, after, strict=True), start=1):
        names = ("teacher", "student before", "student after")
        lines = [f"prompt {number}", *_barred(texts[0])]
        for name, text in zip(names, texts[1:], strict=True):
            lines += [f"  {name}", *_barred(text)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plain_text(renderable: RenderableType, width: int = 120) -> str:
    """What a terminal would show, without colours or cursor movements: for logs and files."""
    sink = io.StringIO()
    console = Console(file=sink, width=width, force_terminal=False, color_system=None, legacy_windows=False)
    console.print(renderable)
    return sink.getvalue()


def _barred(text: str) -> list[str]:
    return [f"  | {line}".rstrip() for line in strip_control(text).split("\n")]


def _value(evaluation: Mapping[str, Any], metric: str) -> float | None:
    value: Any = evaluation
    for part in metric.split("."):
        value = value[part]
    return value


def _estimate(metric: str, value: float | None, stderr: float | None, signed: bool = False) -> Text:
    if value is None or math.isnan(value):
        return Text("not measured", style="dim")
    digits = 2 if metric == "length" else 4
    shown = f"{value:{'+' if signed else ''}.{digits}f}"
    if stderr is not None and not math.isnan(stderr):
        shown += f" ± {stderr:.{digits}f}"
    return Text(shown)


def _verdict(metric: str, difference: float | None, stderr: float | None) -> tuple[str, str]:
    if difference is None or stderr is None or math.isnan(difference) or math.isnan(stderr):
        return "", ""
    arrow = "↑" if difference > 0 else "↓"
    if abs(difference) <= SIGNIFICANT * stderr:
        return "= within the noise", "dim"
    sign = direction(metric) * difference
    if sign == 0:
        return f"{arrow} changed", ""
    return (f"{arrow} better", "green") if sign > 0 else (f"{arrow} worse", "red")
