"""Draws charts as SVG for a page: without scripts, fixed colours or fonts, so that the page's style decides.

matplotlib draws with sentinel colours, which no chart uses otherwise, and each is replaced by a variable of
the page's style sheet. So one file has a light and a dark form. The same data gives the same text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from deploy.report.model import Chart, Series, Timeline
from deploy.safe_text import strip_control

WIDTH, HEIGHT = 4.8, 2.6
"""Inches of a chart: about the width of a phone, so that its text is not made smaller there."""
NUM_COLOURS = 3
"""Series that differ by colour and dashes; ``report.css.j2`` defines as many colours."""
DASHES = ("", "5 2", "1.5 1.5")
"""One per colour, so that a reader who cannot tell the colours apart can tell the lines apart."""
_TEXT, _AXIS, _GRID = "#fe0101", "#fe0102", "#fe0103"
_COLOURS = tuple(f"#fe02{number:02x}" for number in range(1, NUM_COLOURS + 1))
_VARIABLES = {_TEXT: "currentColor", _AXIS: "var(--axis)", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_COLOURS, start=1)
}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _AXIS,
    "xtick.color": _AXIS,
    "ytick.color": _AXIS,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class LegendEntry:
    """How a line looks, for the legend beside a chart."""

    label: str
    number: int
    """Of its colour, from 1."""
    dashes: str


def legend(chart: Chart) -> list[LegendEntry]:
    """The lines of a chart in their order."""
    return [
        LegendEntry(series.label, colour + 1, DASHES[dashes])
        for series, (colour, dashes) in zip(chart.series, _looks(chart), strict=True)
    ]


def _looks(chart: Chart) -> list[tuple[int, int]]:
    """Colour and dashes of each series, by number. The first nine looks differ."""
    numbers = [place if series.look is None else series.look for place, series in enumerate(chart.series)]
    return [(number % NUM_COLOURS, (number + number // NUM_COLOURS) % len(DASHES)) for number in numbers]


def description(drawn: Chart | Timeline) -> str:
    """What a drawing shows, in words and numbers, for readers who do not see it."""
    if isinstance(drawn, Timeline):
        return "; ".join(_of_lane(lane.label, lane.spans) for lane in drawn.lanes) + f" ({drawn.unit})"
    return "; ".join(_of_series(series, drawn.x_label) for series in drawn.series) + f" ({drawn.unit})"


def _of_lane(label: str, spans: Sequence[tuple[float, float]]) -> str:
    if not spans:
        return f"{label}: never"
    shown = ", ".join(f"{begin:g} to {end:g}" for begin, end in _short(spans[:4]))
    return f"{label}: {shown}" + (f" and {len(spans) - 4} more times" if len(spans) > 4 else "")


def _short(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(round(begin, 2), round(end, 2)) for begin, end in spans]


def _of_series(series: Series, x_label: str) -> str:
    first, last = f"{series.y[0]:.4g} at {x_label} {series.x[0]:g}", f"{series.y[-1]:.4g} at {series.x[-1]:g}"
    if len(series.y) == 1:
        return f"{series.label}: {first}"
    return f"{series.label}: from {first} to {last}, lowest {min(series.y):.4g}, highest {max(series.y):.4g}"


def svg(drawn: Chart | Timeline, name: str) -> Markup:
    """A chart or a timeline as an ``svg`` element. ``name``: unique on the page, because ids begin with it."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the settings of the user's own plots would show
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": name})
        figure, axes = _figure(HEIGHT if isinstance(drawn, Chart) else 0.75 + 0.28 * len(drawn.lanes))
        if isinstance(drawn, Chart):
            _draw_lines(axes, drawn)
        else:
            _draw_lanes(axes, drawn)
        sink = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=nothing)
    return _inlined(sink.getvalue(), drawn, name)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.grid(linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)
    return figure, axes


def _draw_lines(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    for series, (colour_number, dashes_number) in zip(chart.series, _looks(chart), strict=True):
        colour, dashes = _COLOURS[colour_number], DASHES[dashes_number]
        style = (0, tuple(map(float, dashes.split()))) if dashes else "solid"
        few = len(series.x) <= 30
        axes.plot(
            series.x,
            series.y,
            color=colour,
            linestyle=style,
            linewidth=1.6,
            marker="." if few else "",
            markersize=6,
        )
        if series.stderr is not None:
            bars = [0.0 if math.isnan(each) else each for each in series.stderr]
            axes.errorbar(
                series.x,
                series.y,
                yerr=bars,
                fmt="none",
                ecolor=colour,
                color=colour,
                elinewidth=1.2,
                capsize=2.5,
            )
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.unit)
    axes.ticklabel_format(useOffset=False, axis="y")
    axes.set_ylim(*_limits(chart, *axes.get_ylim()))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=chart.x_label == "update"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _limits(chart: Chart, low: float, high: float) -> tuple[float, float]:
    """The vertical axis: wide enough that rounding errors do not look like changes, and below 0 only for such values."""
    values = [value for series in chart.series for value in series.y]
    least, most = min(values), max(values)
    room = 0.05 * max(abs(least), abs(most)) or 0.5
    if high - low < room:
        low, high = least - room / 2, most + room / 2
    if least >= 0:
        low = 0.0 if chart.from_zero or least == most == 0 else max(low, 0.0)
    return low, high


def _draw_lanes(axes: Any, timeline: Timeline) -> None:
    from matplotlib.ticker import MaxNLocator

    ends = [end for lane in timeline.lanes for _, end in lane.spans]
    least = (
        max(ends, default=1.0) - min([0.0, *(lane.spans[0][0] for lane in timeline.lanes if lane.spans)])
    ) / 250
    for place, lane in enumerate(timeline.lanes):
        bars = [(begin, max(end - begin, least)) for begin, end in lane.spans]
        axes.broken_barh(bars, (place - 0.35, 0.7), facecolors=_COLOURS[0], linewidth=0)
    axes.set_yticks(range(len(timeline.lanes)), [strip_control(lane.label) for lane in timeline.lanes])
    axes.set_ylim(len(timeline.lanes) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(timeline.unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=timeline.unit == "update"))


def _inlined(text: str, drawn: Chart | Timeline, name: str) -> Markup:
    """An SVG document as an element of a page: named for a screen reader, and without what only a document needs."""
    body = text[text.index(">", text.index("<svg")) + 1 :]
    (view,) = re.findall(r'viewBox="([^"]+)"', text)
    body = re.sub(
        r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL
    )  # its rules would hold for the whole page
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every chart, and nothing refers to them
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", body)
    body = re.sub(r"#fe0[12]\d\d", lambda found: _VARIABLES.get(found[0], found[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    heading = escape(f"{drawn.title}, {drawn.unit}")
    head = Markup(
        '<svg viewBox="{view}" role="img" aria-labelledby="{name}-title {name}-words">\n'
        '<title id="{name}-title">{heading}</title>\n<desc id="{name}-words">{words}</desc>\n'
    ).format(view=view, name=name, heading=heading, words=description(drawn))
    return head + Markup(body)
