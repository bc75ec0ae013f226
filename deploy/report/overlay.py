"""Charts of several runs laid over each other: one chart per measure, one series per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deploy.report.model import Chart


def overlaid(charts: Mapping[str, Sequence[Chart]]) -> list[Chart]:
    """Turn the charts of each run into charts of all runs.

    ``charts``: the label of a run -> its charts. A chart with several series becomes a chart per series, so that the
    series of one chart are of different runs. A run has the same colour in every chart, also where another is missing.
    """
    labels: dict[str, list[str]] = {}
    for own in charts.values():
        for chart in own:
            known = labels.setdefault(chart.title, [])
            known += [series.label for series in chart.series if series.label not in known]
    found: dict[tuple[str, str], Chart] = {}
    for number, (run, own) in enumerate(charts.items()):
        for chart in own:
            for series in chart.series:
                key = (chart.title, series.label)
                several = len(labels[chart.title]) > 1
                title = f"{chart.title}: {series.label}" if several else chart.title
                merged = found.get(key) or replace(chart, title=title, series=(), note="")
                note = merged.note if chart.note in merged.note else f"{merged.note} {chart.note}".strip()
                line = replace(series, label=run, look=number)
                found[key] = replace(merged, series=(*merged.series, line), note=note)
    order = [(title, label) for title, names in labels.items() for label in names]
    return [found[key] for key in order]
