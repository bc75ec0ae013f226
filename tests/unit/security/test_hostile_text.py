"""What a model or the author of a data set wrote can be read, and can do nothing else, wherever it is shown."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.cli import chat
from deploy.exits import guarded
from deploy.report.html import html
from deploy.report.model import (
    Code,
    Column,
    Listing,
    Page,
    Paragraph,
    Report,
    Sample,
    Section,
    Table,
    Tone,
    Toned,
)
from deploy.report.render import markdown
from deploy.report.terminal import print_report
from deploy.run.progress import Progress
from deploy.submit.server import _Printed
from distill.config import DataConfig
from distill.data import load_rows
from distill.errors import ConfigError

ANSI, TITLE, LINK = "\x1b[2J\x1b[31mred", "\x1b]0;owned\x07", "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\"
BIDI, HIDDEN, RETURN = "\u202ereversed\u2066", "\U000e0041tag", "real\roverwritten\x08\x9b2J"
SCRIPT, IMAGE = "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'
MARKUP = "[bold]b[/bold] \\[red]r[/red] [link=http://evil]l[/link]"
HOSTILE = " ".join([ANSI, TITLE, LINK, BIDI, HIDDEN, RETURN, SCRIPT, IMAGE, MARKUP])


def harmless(shown: str) -> bool:
    """Whether a terminal only prints a text."""
    return all(
        c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for c in shown
    )


class _Elements(HTMLParser):
    """The elements of a page, and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


BLOCKS = (
    Paragraph((HOSTILE, Code(HOSTILE), Toned(HOSTILE, Tone.BAD))),
    Table(
        (Column(HOSTILE), Column("n", wraps=True)), (((HOSTILE,), (HOSTILE,)),), title=HOSTILE, note=HOSTILE
    ),
    Sample(HOSTILE, HOSTILE, ((HOSTILE, HOSTILE),)),
)


def test_a_page():
    page = html(Page(HOSTILE, (HOSTILE,), (Section(HOSTILE, (*BLOCKS, Listing(HOSTILE, HOSTILE))),)))
    elements = _Elements(page).found
    assert not {tag for tag, _ in elements} & {"script", "img", "iframe", "object", "link"}
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    assert harmless(page) and page.count("alert(1)") >= 8
    (policy,) = [each["content"] for tag, each in elements if tag == "meta" and "http-equiv" in each]
    assert policy is not None and "default-src 'none'" in policy


def test_a_terminal():
    out = io.StringIO()
    print_report(Report(HOSTILE, BLOCKS), Console(file=out, width=2000))
    assert harmless(out.getvalue()) and "[bold]b[/bold]" in out.getvalue()


def test_markdown():
    """The body of a study's report, which some viewers show with its HTML."""
    text = markdown(Report(HOSTILE, BLOCKS))
    assert harmless(text)
    outside = re.sub(r"^```+$.*?^```+$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert outside.count("alert(1)") >= 3 and "<script" not in outside and "<img" not in outside
    assert markdown(Report("t", (Paragraph(("p < 0.05 and a<b",)),))).strip() in ("p < 0.05 and a&lt;b",)


def test_live_lines():
    out = io.StringIO()
    with Progress(Console(file=out, width=2000)) as progress:
        progress.say(HOSTILE)
        progress.show(HOSTILE, force=True)
    assert harmless(out.getvalue()) and out.getvalue().count("[bold]b[/bold] \\[red]r[/red]") == 2


def test_a_changing_line_has_no_markup():
    """An escaped bracket behind a backslash would begin a tag of rich's."""
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=200)) as progress:
        progress.show(r"\[bold red]words")
        assert progress._status is not None
        progress._status._live.refresh()
    assert r"\[bold red]words" in out.getvalue() and "\x1b[1;31m" not in out.getvalue()


def test_a_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setattr(chat, "local_checkpoint", lambda *_: tmp_path)
    monkeypatch.setattr(chat, "_load", lambda *_: lambda _: HOSTILE)
    lines = iter(["hello", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat.run_chat(str(tmp_path), None, 8)
    chat.run_chat(str(tmp_path), "hello", 8)
    shown = capsys.readouterr()
    assert harmless(shown.out) and harmless(shown.err) and shown.out.count("[bold]b") == 2


def test_logs_of_a_job():
    out = io.StringIO()
    printed = _Printed(out)
    for part in (HOSTILE[:9], HOSTILE[9:]):
        printed.more(part)
    assert harmless(out.getvalue()) and "[bold]b" in out.getvalue()


ROWS: list[dict[str, Any]] = [
    {HOSTILE: "x"},
    {"messages": [{"role": HOSTILE, "content": "x"}]},
    {"messages": [{"role": "user", "content": "x", HOSTILE: "y"}]},
    {"messages": [{"role": "user", "content": [{"type": HOSTILE}]}]},
    {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": HOSTILE, "arguments": 3}]}]},
    {"prompt": "x", "completion": [{"role": "user\n" + HOSTILE, "content": "x"}]},
]


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_errors_that_quote_a_row(row: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[row]) + "\n")

    def read(_: None) -> int:
        load_rows(DataConfig(path=str(path)), tmp_path)
        return 0

    assert guarded(read, None) == ConfigError.exit_code
    line = capsys.readouterr().err
    assert harmless(line) and line.count("\n") == 1 and line.startswith("distill: ")
