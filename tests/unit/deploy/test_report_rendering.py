"""One report as Markdown and on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from deploy.report.model import (
    Block,
    Code,
    Column,
    Interval,
    Number,
    Paragraph,
    Report,
    Sample,
    Table,
    Tone,
    Toned,
)
from deploy.report.render import markdown
from deploy.report.terminal import print_report

INTERVAL = Interval(-0.07, -0.08, -0.06, significant=True)
TABLE = Table(
    columns=(Column("recipe"), Column("TV", numeric=True), Column("verdict")),
    rows=(
        ((Code("kd"),), (Number(0.3), " (", INTERVAL, ")"), (Toned("better", Tone.GOOD),)),
        ((Code("jsd"),), (Number(-2, digits=1, signed=True, stderr=0.25),), ()),
        (("[bold]a|b\nc[/bold]",), (Number(1, stderr=float("nan")),), ()),
    ),
    title="Before [red]and[/red] after",
    note="TV: total variation.",
)
SAMPLE = Sample(
    "prompt 1",
    "Why?",
    (
        ("teacher", "Because\n  student after\nforged"),
        ("student before", "\x1b[2Jno"),
        ("student after", "[red]````\nyes[/red]"),
    ),
)


def report(*blocks: Block) -> Report:
    return Report("Run 1", blocks)


def terminal(shown: Report, *, width: int = 120, colours: bool = False) -> str:
    sink = io.StringIO()
    print_report(shown, Console(file=sink, width=width, force_terminal=colours, legacy_windows=False))
    return sink.getvalue()


def test_markdown_of_paragraphs_and_tables():
    text = markdown(report(Paragraph(("Study ", Code("tiny"), " of <2> *")), TABLE, replace(TABLE, note="")))
    rows = (
        "| recipe | TV | verdict |\n| --- | --- | --- |\n"
        "| `kd` | 0.3000 (-0.0700* [-0.0800, -0.0600]) | better |\n"
        "| `jsd` | -2.0 ± 0.2 |  |\n"
        "| [bold]a\\|b c[/bold] | 1.0000 |  |\n"
    )
    title = "Before [red]and[/red] after:"
    assert text == f"Study `tiny` of <2> *\n\n{title} TV: total variation.\n\n{rows}\n{title}\n\n{rows}"
    assert markdown(report(replace(TABLE, title=""))) == rows


def test_markdown_of_model_text_stays_in_its_code_block():
    text = markdown(report(SAMPLE))
    assert text == (
        "prompt 1:\n\n```\nWhy?\n```\n\n"
        "teacher:\n\n```\nBecause\n  student after\nforged\n```\n\n"
        "student before:\n\n```\nno\n```\n\n"
        "student after:\n\n`````\n[red]````\nyes[/red]\n`````\n"
    )


def test_a_terminal_shows_text_without_parsing_it_as_markup():
    lines = terminal(report(Paragraph(("Study ", Code("tiny"), " [bold]")), TABLE)).splitlines()
    assert lines[:4] == ["", "Run 1", "", "Study tiny [bold]"]
    assert lines[5].strip() == "Before [red]and[/red] after"
    assert lines[-1].strip() == "TV: total variation."
    assert any("-0.0700* [-0.0800, -0.0600]" in line and "better" in line for line in lines)
    assert any("[bold]a|b" in line for line in lines)


def test_colours_are_for_terminals():
    assert "\x1b[32mbetter" in terminal(report(TABLE), colours=True)
    assert terminal(report(TABLE)).replace("\n", "").isprintable()


def test_model_text_is_behind_a_bar_on_a_terminal():
    assert terminal(report(SAMPLE)).splitlines()[3:] == [
        "prompt 1",
        "  | Why?",
        "  teacher",
        "  | Because",
        "  |   student after",
        "  | forged",
        "  student before",
        "  | no",
        "  student after",
        "  | [red]````",
        "  | yes[/red]",
    ]


def test_wrapped_model_text_is_behind_a_bar_too():
    """Otherwise an answer of the right length could put a forged heading at the start of a line."""
    width = 40
    answer = "x" * (width - 4) + "  student after " + "y" * 100 + "\n\nend"
    sample = Sample("prompt 1", "Why?", (("teacher", answer),))
    lines = terminal(report(sample), width=width, colours=True).splitlines()
    quoted = lines[lines.index("  teacher") + 1 :]
    assert all(line == "  |" or line.startswith("  | ") for line in quoted)
    assert max(map(len, quoted)) <= width
    assert "".join(line[4:] for line in quoted).replace(" ", "") == answer.replace(" ", "").replace("\n", "")
