"""Renders reports through the templates next to this module."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

from deploy.report.model import Code, Paragraph, Report, Sample, Table
from deploy.report.templating import environment
from deploy.safe_text import strip_control


def markdown(report: Report) -> str:
    """A report as Markdown. Its title is not part of the text, which is the body of a page."""
    return _ENVIRONMENT.get_template("report.md.j2").render(report=report)


def _inert(value: Any) -> Any:
    """Text that begins no HTML element where Markdown is shown with its HTML. ``p < 0.05`` stays as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", strip_control(value))


def _cell(text: str) -> str:
    """Text that cannot end its cell of a Markdown table."""
    return text.replace("|", r"\|").replace("\n", " ")


def _fenced(text: str) -> Markup:
    """Text in a Markdown code block that it cannot close: the fence is longer than any in the text.

    Such a block shows HTML as it is, so nothing in it is replaced.
    """
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}\n{strip_control(text)}\n{fence}")


_ENVIRONMENT = environment(
    {"cell": _cell, "fenced": _fenced}, Code, Paragraph, Table, Sample, finalize=_inert
)
