"""Prints reports on a terminal, or as plain text into a log file."""

from __future__ import annotations

from collections.abc import Iterator

import rich.table
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from deploy.report.model import Block, Line, Paragraph, Report, Sample, Table, Tone, Toned, piece_text
from deploy.safe_text import printable

LOG_WIDTH = 120
"""Characters per line where there is no terminal to ask for its width."""
_STYLES = {Tone.GOOD: "green", Tone.BAD: "red", Tone.FAINT: "dim"}


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report, on standard output unless a console is given."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print()
    console.print(Text(printable(report.title), style="bold"))
    for block in report.blocks:
        console.print()
        for part in _parts(block):
            console.print(part)


def _parts(block: Block) -> Iterator[RenderableType]:
    match block:
        case Paragraph():
            yield _text(block.line)
        case Table():
            yield _table(block)
        case Sample():
            yield Text(printable(block.title))
            yield _Quoted(block.prompt)
            for who, answer in block.answers:
                yield Text(f"  {printable(who)}")
                yield _Quoted(answer)


def _text(line: Line) -> Text:
    pieces = (
        Text(printable(piece_text(piece)), style=_STYLES[piece.tone] if isinstance(piece, Toned) else "")
        for piece in line
    )
    return Text().join(pieces)


def _table(table: Table) -> rich.table.Table:
    """The first column, which names the rows, and columns of long text are wrapped where the terminal is narrow."""
    shown = rich.table.Table(
        title=Text(printable(table.title), style="table.title") if table.title else None,
        title_justify="left",
        caption=Text(printable(table.note), style="table.caption") if table.note else None,
        caption_justify="left",
    )
    for number, column in enumerate(table.columns):
        shown.add_column(
            Text(printable(column.heading)),
            justify="right" if column.numeric else "left",
            no_wrap=number > 0 and not column.wraps,
            overflow="fold" if column.wraps else "ellipsis",
        )
    for row in table.rows:
        shown.add_row(*map(_text, row))
    return shown


class _Quoted:
    """Text from a model. Every line, wrapped ones too, is behind a bar, so none can pass for a heading."""

    def __init__(self, text: str) -> None:
        self._content = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        bar = "  | "
        width = max(1, options.max_width - len(bar))
        for line in Text(printable(self._content)).wrap(console, width, overflow="fold"):
            line.rstrip()
            yield Text(bar).append_text(line) if line else Text(bar.rstrip())
