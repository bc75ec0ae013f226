"""The charts of a run: learning curves, busy shares of the stages, and the stages in their order.

Every series has at most :data:`MOST_POINTS` points, so that the page of a long run stays small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from deploy.report.model import Chart, Lane, Series, Timeline
from deploy.report.run_files import RunFiles, number_in
from deploy.run.training.advice import mean_row
from deploy.run.training.clocks import COUNTED_S, STAGES, limit_of
from distill.run.alarms import WEAK

MOST_POINTS = 400
"""A chart is some 400 units wide, so a reader could not distinguish more points than this."""
_TEACHER, _STUDENT = "teacher's text (off policy)", "student's text (on policy)"


@dataclass(frozen=True)
class _Curve:
    """A chart of columns of ``metrics.parquet``."""

    title: str
    unit: str
    columns: Mapping[str, str]
    """Column -> label. Columns that a recipe does not have are left out."""
    note: str = ""
    from_zero: bool = False


def _both(part: str, name: str) -> dict[str, str]:
    return {f"{part}/teacher_text.{name}": _TEACHER, f"{part}/student_text.{name}": _STUDENT}


_CURVES = (
    _Curve(
        "Critics' moment gap d_MM",
        "gap in mean action value",
        _both("critic", "d_mm"),
        "How far the critics can separate teacher and student; 0 when they cannot.",
    ),
    _Curve(
        "Critics' tightness",
        "share of the best gap",
        _both("critic", "tightness"),
        f"What the critic reaches of the gap of the best critic; below {WEAK} an alarm is raised.",
    ),
    _Curve("Critics' loss", "loss (minimised)", _both("critic", "loss")),
    _Curve("Student's loss", "loss (minimised)", {"policy/loss": "student"}),
    _Curve(
        "Total variation in training batches",
        "total variation, 0 to 1",
        _both("policy", "tv"),
        "On the texts of each update, which are not held out.",
    ),
    _Curve("Student's entropy", "nats per token", _both("policy", "entropy")),
    _Curve(
        "Long-horizon gradient over the direct one",
        "ratio of norms",
        {"policy/long_over_direct": "student's text"},
        "Norms of the two gradients in the student's logits.",
    ),
    _Curve(
        "Gradient norms",
        "norm before clipping",
        {"policy/grad_norm": "student", "critic/grad_norm": "critics, mean over steps"},
    ),
    _Curve("Length of the student's responses", "tokens", {"policy/response_length": "mean of an update"}),
    _Curve(
        "Responses that the length limit cut",
        "share of responses",
        {"policy/truncated_share": "student's responses"},
    ),
    _Curve(
        "Age of the student's text",
        "updates",
        {"policy/age_max": "oldest of an update", "policy/age_mean": "mean of an update"},
        "Updates between the weights that sampled the text and the update that uses it.",
    ),
)
_EVALUATED = (
    ("Held-out total variation", "total variation, 0 to 1", {
        "teacher_text.tv": "teacher's text", "student_text.tv": "student's text",
    }),
    ("Held-out forward KL", "nats per token", {
        "teacher_text.forward_kl": "teacher's text", "student_text.forward_kl": "student's text",
    }),
    ("Held-out reverse KL", "nats per token", {
        "teacher_text.reverse_kl": "teacher's text", "student_text.reverse_kl": "student's text",
    }),
    ("Likeness of held-out answers", "ROUGE-L F1, 0 to 1", {
        "rouge_l.teacher": "with the teacher", "rouge_l.reference": "with the reference",
    }),
)  # fmt: skip


def evaluation_charts(run: RunFiles) -> list[Chart]:
    """The evaluations before, during and after training, with one standard error."""
    points = [(0.0, run.before)] if run.before is not None else []
    points += [(float(each.update), each.evaluation) for each in run.during]
    if run.after is not None:
        points.append((float(run.updates), run.after))
    kept = [points[number] for number in _spread(len(points))]
    if len(kept) < 2:
        return []
    charts: list[Chart] = []
    for title, unit, metrics in _EVALUATED:
        found: list[Series] = []
        for metric, label in metrics.items():
            values = [(update, *evaluation.estimate(metric)) for update, evaluation in kept]
            values = [each for each in values if math.isfinite(each[1])]
            if values:
                x, y, stderr = zip(*values, strict=True)
                found.append(Series(label, x, y, stderr))
        if found:
            note = "Error bars: one standard error over prompts."
            charts.append(Chart(title, unit, tuple(found), note))
    return charts


def update_charts(run: RunFiles) -> list[Chart]:
    """What each update measured."""
    charts = [_of_columns(run.metrics, curve) for curve in _CURVES]
    warm = [event for event in run.events if event["event"] == "sft_update"]
    losses = [(number_in(event, "update"), number_in(event, "sft/loss")) for event in warm]
    pairs = [(update, loss) for update, loss in losses if update is not None and loss is not None]
    if pairs:
        series = _thinned("cross-entropy", *np.array(pairs, dtype=float).T)
        charts.insert(0, Chart("Warm start", "nats per token", (series,), "Before the distillation."))
    return [chart for chart in charts if chart is not None]


def _of_columns(metrics: Mapping[str, np.ndarray], curve: _Curve) -> Chart | None:
    series = [
        _thinned(label, metrics["update"], metrics[name])
        for name, label in curve.columns.items()
        if name in metrics
    ]
    shown = tuple(each for each in series if each.x)
    if not shown:
        return None
    per_point = math.ceil(len(metrics["update"]) / MOST_POINTS)
    mean = f"Each point is the mean of {per_point} updates." if per_point > 1 else ""
    return Chart(curve.title, curve.unit, shown, f"{curve.note} {mean}".strip(), from_zero=curve.from_zero)


def _thinned(label: str, x: np.ndarray, y: np.ndarray) -> Series:
    """A series of the finite values; of a long one, the means of equally many neighbours."""
    seen = np.isfinite(y)
    x, y = x[seen], y[seen]
    width = max(1, math.ceil(len(x) / MOST_POINTS))
    starts = np.arange(0, len(x), width)
    if width > 1:
        counts = np.diff(np.append(starts, len(x)))
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return Series(label, tuple(map(float, x)), tuple(map(float, y)))


def _spread(count: int) -> Sequence[int]:
    """At most :data:`MOST_POINTS` of ``count`` places, the first and the last among them."""
    if count <= MOST_POINTS:
        return range(count)
    return sorted({round(place) for place in np.linspace(0, count - 1, MOST_POINTS)})


def busy_chart(run: RunFiles) -> Chart | None:
    """The part of the time in which an actor of each stage was busy."""
    columns = {f"{stage}/busy_share": stage for stage in STAGES}
    note = "1: busy all the time. In lock-step the stages take turns, so the shares add up to about 1."
    return _of_columns(
        run.metrics, _Curve("Busy shares of the stages", "share of the time", columns, note, from_zero=True)
    )


def limit_timeline(run: RunFiles) -> Timeline | None:
    """Which stage had the largest busy share, over the updates."""
    chart = busy_chart(run)
    if chart is None:
        return None
    rows: dict[float, dict[str, float]] = {}
    for series in chart.series:
        for update, share in zip(series.x, series.y, strict=True):
            rows.setdefault(update, {})[f"{series.label}/busy_share"] = share
    updates = sorted(rows)
    spans: dict[str, list[tuple[float, float]]] = {stage: [] for stage in STAGES}
    since = min(0.0, updates[0] - 1) if len(updates) == 1 else updates[0] - (updates[1] - updates[0])
    for update in updates:
        limit = limit_of(rows[update])
        if limit is not None:
            own = spans[limit.stage]
            if own and own[-1][1] == since:
                own[-1] = (own[-1][0], update)
            else:
                own.append((since, update))
        since = update
    lanes = tuple(Lane(stage, tuple(own)) for stage, own in spans.items())
    return Timeline("The limiting stage", "update", lanes, "The stage with the largest busy share.")


def mean_row_of(run: RunFiles) -> dict[str, float]:
    """The mean busy shares of the updates so far, and the newest numbers of actors."""
    wanted = [
        name
        for stage, (_, actors) in STAGES.items()
        for name in (f"{stage}/busy_share", actors, COUNTED_S)
        if name in run.metrics
    ]
    columns = {name: run.metrics[name] for name in wanted if name is not None}
    rows = [
        {name: float(value) for name, value in zip(columns, values, strict=True) if math.isfinite(value)}
        for values in zip(*columns.values(), strict=True)
    ]
    return mean_row([row for row in rows if row.get(COUNTED_S, 1.0) > 0])


def seconds_chart(run: RunFiles) -> Chart | None:
    columns = {"timing/update_s": "update", "timing/push_s": "weight push"}
    note = "Evaluations and checkpoints are not part of an update's seconds."
    return _of_columns(run.metrics, _Curve("Seconds of an update", "seconds", columns, note, from_zero=True))


def stage_timeline(run: RunFiles) -> Timeline | None:
    """The stages of all starts on one clock, which stands still between two starts, and the ends of evaluations and
    checkpoints."""
    lanes: dict[str, list[tuple[float, float]]] = {}
    offset = 0.0
    starts = 0
    for known in _by_start(run.events):
        begin, end = known[0][0], max(at for at, _ in known)
        starts += 1
        spans = [*_spans(known, end), *([("resumed", begin, begin)] if starts > 1 else [])]
        for name, since, until in spans:
            own = lanes.setdefault(name, [])
            if len(own) < MOST_POINTS:
                own.append((since - begin + offset, until - begin + offset))
        offset += end - begin
    shown = tuple(Lane(name, tuple(spans)) for name, spans in list(lanes.items())[:12])
    unit = "minutes since the start" if starts < 2 else "minutes, without the time between two starts"
    return Timeline("The run's stages", unit, shown) if shown else None


def _by_start(events: Sequence[Mapping[str, Any]]) -> Iterator[list[tuple[float, Mapping[str, Any]]]]:
    """The events of each start with the minute of each; those without a time, and starts with one event, are left out."""
    begins = [place for place, event in enumerate(events) if event["event"] == "started"]
    for begin, end in itertools.pairwise([*begins, len(events)]):
        timed = [(_minutes(event), event) for event in events[begin:end]]
        known = [(at, event) for at, event in timed if at is not None]
        if len(known) >= 2:
            yield known


def _spans(
    known: Sequence[tuple[float, Mapping[str, Any]]], end: float
) -> Iterator[tuple[str, float, float]]:
    """(name, begin, end) of stages, and of the distillation, which has no event for its end when it is cut off."""
    open_stages: dict[str, float] = {}
    for at, event in known:
        stage = str(event.get("stage"))[:40].replace("_", " ")
        match event["event"]:
            case "stage_started":
                open_stages[stage] = at
            case "stage_finished" if stage in open_stages:
                yield stage, open_stages.pop(stage), at
            case "training_started":
                open_stages["distillation"] = at
            case "evaluated":
                yield "evaluation ends", at, at
            case "checkpoint":
                yield "checkpoint ends", at, at
    for stage, begin in open_stages.items():
        yield stage, begin, end


def _minutes(event: Mapping[str, Any]) -> float | None:
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp() / 60
    except (ValueError, OverflowError):
        return None
