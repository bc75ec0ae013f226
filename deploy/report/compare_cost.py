"""What limited runs and what they cost, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from deploy.report.comparable import Compared, listed
from deploy.report.curves import mean_row_of
from deploy.report.model import Column, Line, Table, Tone, Toned
from deploy.report.run_files import RunFiles, number_in, numbers_in
from deploy.report.run_page import advice_of, sentence
from deploy.run.training.clocks import STAGES, limit_of

_ABSENT: Line = (Toned("not known", Tone.FAINT),)


def stage_lines(runs: Sequence[Compared]) -> Iterator[Line]:
    """The limiting stage of each run, with what would make it faster."""
    unknown: list[str] = []
    for each in runs:
        advice = advice_of(each.run)
        if advice is None:
            unknown.append(each.label)
        else:
            yield (f"{each.label}: {sentence(advice)}",)
    if unknown:
        yield (Toned(f"Which stage limits {listed(unknown)} is not known.", Tone.FAINT),)
    cores = {each.letter: each.run.setup.num_cores for each in runs if each.run.setup is not None}
    if len(set(cores.values())) > 1:
        counts = listed(
            [f"{letter} {count if count is not None else 'none'}" for letter, count in cores.items()]
        )
        yield (
            Toned(
                f"The seconds are of machines of different sizes. Shared cores of each run: {counts}.",
                Tone.BAD,
            ),
        )


def cost_table(runs: Sequence[Compared]) -> Table:
    """Seconds, tokens and memory: a row per quantity, a column per run."""
    costs = {each.letter: _costs(each.run) for each in runs}
    names = dict.fromkeys(name for own in costs.values() for name in own)
    rows = tuple(
        ((name,), *((own[name],) if name in own else _ABSENT for own in costs.values())) for name in names
    )
    columns = (Column("what"), *(Column(letter, numeric=True) for letter in costs))
    note = (
        "Minutes in all and seconds by activity are those of the last start, and only a run that has ended has them. "
        "Seconds of actors (… busy) add up over the actors of a pool. Memory is proportional set size (PSS)."
    )
    return Table(columns, rows, "Cost", note)


def _costs(run: RunFiles) -> dict[str, str]:
    """Quantity -> its value as it is shown."""
    summary = run.summary or {}
    found: dict[str, str] = {"updates": f"{run.updates:,}"}
    if (wall_s := number_in(summary, "wall_s")) is not None:
        found["minutes in all"] = f"{wall_s / 60:,.1f}"
    if (incarnations := number_in(summary, "incarnations")) is not None:
        found["starts"] = f"{incarnations:,.0f}"
    if (seconds := _mean(run, "timing/update_s")) is not None:
        found["seconds of an update (mean)"] = f"{seconds:,.2f}"
    shares = mean_row_of(run)
    if (limit := limit_of(shares)) is not None:
        found["limiting stage"] = limit.stage
    for stage in STAGES:
        if (share := shares.get(f"{stage}/busy_share")) is not None:
            found[f"busy share: {stage}"] = f"{share:.2f}"
    for name, value in _named(numbers_in(summary, "timing_s")).items():
        if value:
            found[f"seconds: {name}"] = f"{value:,.1f}"
    for name, value in _named(numbers_in(summary, "tokens")).items():
        found[f"tokens: {name}"] = f"{value:,.0f}"
    for name, value in _named(numbers_in(summary, "peak_pss_bytes")).items():
        found[f"GiB of memory: {name}"] = f"{value / 2**30:,.2f}"
    return found


def _named(values: Mapping[str, float]) -> dict[str, float]:
    """The values under the names that a reader sees, in their order."""
    return {name.replace("_", " ")[:40]: values[name] for name in sorted(values)}


def _mean(run: RunFiles, column: str) -> float | None:
    values = run.metrics.get(column, np.zeros(0))
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
