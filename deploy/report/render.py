"""Renders reports through the templates next to this module."""

from __future__ import annotations

import re

from deploy.report.model import Code, Paragraph, Report, Sample, Table
from deploy.report.templating import environment


def markdown(report: Report) -> str:
    """A report as Markdown. Its title is not part of the text, which is the body of a page."""
    return _ENVIRONMENT.get_template("report.md.j2").render(report=report)


def _cell(text: str) -> str:
    """Text that cannot end its cell of a Markdown table."""
    return text.replace("|", r"\|").replace("\n", " ")


def _fenced(text: str) -> str:
    """Text in a Markdown code block that it cannot close: the fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


_ENVIRONMENT = environment({"cell": _cell, "fenced": _fenced}, Code, Paragraph, Table, Sample)
