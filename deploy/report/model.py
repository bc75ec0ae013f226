"""The model of a report: its contents, free of any markup.

``run_report.py`` builds the report of a run and ``deploy/study/tables/study_report.py`` that of a study.
The renderers (``terminal.py``, ``render.py``) turn either into text. ``run_page.py`` builds the page of a
run, which has sections and charts as well; ``html.py`` turns it into a file for a browser. A cell or a paragraph is a line: a
sequence of pieces, which are plain text or values that know how many digits they have. A renderer adds
markup around pieces and takes their text from :func:`piece_text`, so that numbers look alike everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from deploy.safe_text import strip_control


class Tone(Enum):
    """How a reader should take a piece of text."""

    GOOD = "good"
    BAD = "bad"
    FAINT = "faint"


@dataclass(frozen=True)
class Toned:
    """Text with a tone."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Code:
    """A name or a command that the user writes in exactly this way."""

    text: str


@dataclass(frozen=True)
class Number:
    """A value, with its standard error if it has one."""

    value: float
    digits: int = 4
    signed: bool = False
    stderr: float | None = None


@dataclass(frozen=True)
class Interval:
    """A difference with its confidence interval."""

    difference: float
    low: float
    high: float
    significant: bool
    """Significant differences are marked with a star."""


Piece = str | Code | Toned | Number | Interval
Line = tuple[Piece, ...]


@dataclass(frozen=True)
class Paragraph:
    line: Line


@dataclass(frozen=True)
class Column:
    heading: str
    numeric: bool = False
    wraps: bool = False
    """Whether a narrow terminal may break its cells into lines. The first column always wraps."""


@dataclass(frozen=True)
class Table:
    """Rows of cells, one cell per column; the first cell names the row."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Line, ...], ...]
    title: str = ""
    note: str = ""
    """Explains the columns."""


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers to it. All of it is text from models or data, so it is made safe here."""

    title: str
    prompt: str
    answers: tuple[tuple[str, str], ...]
    """(who answered, the answer)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", strip_control(self.prompt))
        safe = tuple((who, strip_control(answer)) for who, answer in self.answers)
        object.__setattr__(self, "answers", safe)


Block = Paragraph | Table | Sample


@dataclass(frozen=True)
class Report:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    stderr: tuple[float, ...] | None = None
    """Half the length of each point's error bar, or NaN without one."""
    look: int | None = None
    """Number of its colour and dashes, from 0. None: its place in the chart."""


@dataclass(frozen=True)
class Chart:
    """Values over the course of a run. All series share one unit, so that one axis serves them."""

    title: str
    unit: str
    series: tuple[Series, ...]
    note: str = ""
    x_label: str = "update"
    from_zero: bool = False
    """Whether the vertical axis begins at 0, for amounts that are compared as amounts."""


@dataclass(frozen=True)
class Lane:
    """What is true of one name over the course of a run: spans (from, to)."""

    label: str
    spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Timeline:
    """Lanes above each other, with one horizontal axis."""

    title: str
    unit: str
    lanes: tuple[Lane, ...]
    note: str = ""


@dataclass(frozen=True)
class Items:
    """A list without an order that matters."""

    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Listing:
    """The text of a file, shown as it is."""

    title: str
    text: str


PageBlock = Block | Chart | Timeline | Items | Listing


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading."""

    title: str
    blocks: tuple[PageBlock, ...]


@dataclass(frozen=True)
class Page:
    """A report for a browser."""

    title: str
    lead: Line
    """What came out, in one sentence."""
    sections: tuple[Section, ...]


def piece_text(piece: Piece) -> str:
    """The text of a piece without markup."""
    match piece:
        case str():
            return piece
        case Code() | Toned():
            return piece.text
        case Number():
            shown = f"{piece.value:{'+' if piece.signed else ''}.{piece.digits}f}"
            if piece.stderr is None or math.isnan(piece.stderr):
                return shown
            return f"{shown} ± {piece.stderr:.{piece.digits}f}"
        case Interval():
            star = "*" if piece.significant else ""
            return f"{piece.difference:+.4f}{star} [{piece.low:+.4f}, {piece.high:+.4f}]"
