"""Turns a page into one HTML file that needs nothing else: no script, no request, no font.

Text of models and of data is hostile until it is shown. Every text loses its control characters and is
escaped, and the page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from deploy.report.charts import legend, svg
from deploy.report.model import (
    Chart,
    Code,
    Items,
    Listing,
    Page,
    Paragraph,
    Sample,
    Table,
    Timeline,
    Toned,
)
from deploy.report.templating import environment
from deploy.safe_text import printable

LONGEST_TEXT = 6000
"""Characters of a model's text that the page shows."""


def html(page: Page) -> str:
    """The page as the text of one file. The same page gives the same text."""
    return _ENVIRONMENT.get_template("report.html.j2").render(page=page)


def _cut(text: str) -> str:
    """A text of bounded length."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}\n… ({len(text) - LONGEST_TEXT} more characters)"


def _safe(value: Any) -> Any:
    """What the template shows of a value: printable text; it is escaped after that."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = environment(
    {"cut": _cut, "svg": svg, "legend": legend},
    *(Chart, Code, Items, Listing, Paragraph, Sample, Table, Timeline, Toned),
    autoescape=True,
    finalize=_safe,
)
