"""What a run folder contains, read without trust: a run may still write it, or have died while it did.

Nothing here raises because of a file. What cannot be read is named in :attr:`RunFiles.problems`, one line per
thing, and the report is made from the rest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from deploy.run.training.advice import Setup
from distill.errors import ConfigError, first_line
from distill.evaluation import Estimate, Evaluation, load_evaluation, paired_difference
from distill.files import LineReader
from distill.run.folder import RunFolder
from distill.run.metrics import read_metrics

Read = TypeVar("Read")
READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    ConfigError,
    pa.ArrowException,
)
"""What a torn or foreign file can raise while it is read and checked."""
_STEP = re.compile(r"step-(\d{1,15})")
LARGEST_TEXT_BYTES = 1 << 20
"""Of ``config.yaml``; the rest is not shown."""


@dataclass(frozen=True)
class Checkpointed:
    """An evaluation with the number of updates before it."""

    update: int
    evaluation: Evaluation


@dataclass
class RunFiles:
    """The readable contents of a run folder."""

    folder: RunFolder
    problems: list[str] = field(default_factory=list)
    """One line per thing that the report lacks, with the reason."""
    summary: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    """Column -> values, one per update; ``update`` is always there, and NaN stands for null."""
    events: list[dict[str, Any]] = field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None
    during: list[Checkpointed] = field(default_factory=list)
    """The evaluations during training, by ascending update."""
    answers: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    """"before" and "after" -> rows with ``prompt``, ``teacher`` and ``student``."""
    paired: dict[str, Estimate] = field(default_factory=dict)
    """Metric -> difference of :attr:`newest` and the student before training."""
    best: dict[str, Any] | None = None
    failure: dict[str, Any] | None = None
    is_running: bool = False

    @property
    def setup(self) -> Setup | None:
        """What an advice needs to know of the run, from its last start."""
        starts = [event for event in self.events if event.get("event") == "training_started"]
        return Setup.read(starts[-1].get("setup")) if starts else None

    @property
    def has_ended(self) -> bool:
        return self.summary is not None

    @property
    def newest(self) -> Evaluation | None:
        """The evaluation after training, or the last one so far."""
        return self.after or (self.during[-1].evaluation if self.during else None)

    @property
    def updates(self) -> int:
        """Updates that the metrics or the summary know of."""
        made = self.metrics.get("update", np.zeros(0))
        known = number_in(self.summary or {}, "updates") or 0
        return int(max([known, *made[-1:]]))

    @property
    def planned_updates(self) -> int | None:
        planned = number_in(self.settings, "learner.num_updates")
        return int(planned) if planned is not None else None


def read_run(run_dir: str | Path) -> RunFiles:
    """Read what there is in a run folder.

    Raises: ConfigError when the folder is not a run's.
    """
    folder = RunFolder(run_dir)
    folder.require()
    found = RunFiles(folder)
    _read_identity(found)
    _read_end(found)
    _read_metrics(found)
    _read_events(found)
    _read_evaluations(found)
    _read_answers(found)
    if found.before is not None and found.newest is not None:
        try:
            found.paired = paired_difference(found.before, found.newest)
        except ValueError as error:
            found.problems.append(f"differences are not shown, because {first_line(error)}")
    return found


def number_in(mapping: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a mapping; None when it has something else there."""
    value = mapping.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def numbers_in(mapping: Mapping[str, Any], name: str) -> dict[str, float]:
    """The finite numbers of a mapping in a mapping; empty when it has something else there."""
    inner = mapping.get(name)
    if not isinstance(inner, Mapping):
        return {}
    found = {str(key): number_in(inner, key) for key in inner}
    return {key: value for key, value in found.items() if value is not None}


def _attempt(
    found: RunFiles, path: Path, read: Callable[[], Read], *, absent: str = "", lost: str
) -> Read | None:
    """The result of ``read``; None when the file is not there or broken, which becomes a problem.

    ``absent``: what the absence means, and nothing if absence is usual; ``lost``: what the report lacks without it.
    """
    name = str(path.relative_to(found.folder.path))
    try:
        if not path.exists():
            if absent:
                found.problems.append(f"{name} is not there: {absent}; {lost}")
            return None
        return read()
    except READ_ERRORS as error:
        reason = type(error).__name__ if isinstance(error, KeyError) else first_line(error)
        found.problems.append(f"{name} cannot be read ({reason[:300]}); {lost}")
        return None


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(value, dict):
        raise ValueError("it must be a JSON object")
    return value


def _read_identity(found: RunFiles) -> None:
    folder = found.folder
    identity = folder.path / "run.json"
    found.identity = (
        _attempt(found, identity, lambda: _object(identity), lost="the run's id and start are not shown")
        or {}
    )
    found.settings = (
        _attempt(
            found,
            folder.settings,
            lambda: _object(folder.settings),
            absent="the run died while it started, or is older than this file",
            lost="how many updates it was to make is not shown",
        )
        or {}
    )
    found.config = _attempt(
        found,
        folder.config,
        lambda: _text(folder.config),
        absent="somebody removed it",
        lost="the configuration is not shown",
    )


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(LARGEST_TEXT_BYTES + 1)
    cut = "\n… (the rest is not shown)" if len(data) > LARGEST_TEXT_BYTES else ""
    return data[:LARGEST_TEXT_BYTES].decode(errors="replace") + cut


def _read_end(found: RunFiles) -> None:
    folder = found.folder
    try:
        found.is_running = folder.is_running
    except OSError:  # a file system without locks, or a lock of another user
        found.is_running = False
    state = (
        "the run is still being written"
        if found.is_running
        else f"the run has not ended, and `{folder.resume_command}` continues it"
    )
    found.summary = _attempt(
        found,
        folder.summary,
        folder.read_summary,
        absent=state,
        lost="total time, tokens, memory and the limit of the whole training are not shown",
    )
    best = folder.best_numbers
    found.best = _attempt(found, best, lambda: _object(best), lost="the best student is not named")
    found.failure = _attempt(
        found, folder.failure, lambda: _object(folder.failure), lost="why the run failed is not shown"
    )


def _read_metrics(found: RunFiles) -> None:
    table = _attempt(
        found,
        found.folder.metrics,
        lambda: read_metrics(found.folder.path),
        absent="no update has been made yet",
        lost="losses and busy shares are not shown",
    )
    columns: dict[str, np.ndarray] = {}
    for name in table.column_names if table is not None else ():
        try:
            columns[name] = table[name].cast(pa.float64()).to_numpy()  # type: ignore[index]
        except READ_ERRORS:
            found.problems.append(f"metrics.parquet has no numbers in column {name[:80]!r}; it is not shown")
    updates = columns.get("update")
    if updates is None or not len(updates) or not np.isfinite(updates).all():
        if table is not None:
            found.problems.append("metrics.parquet has no rows; losses and busy shares are not shown")
        columns = {"update": np.zeros(0)}
    found.metrics = columns


def _read_events(found: RunFiles) -> None:
    def read() -> int:
        reader = LineReader(found.folder.events, _event)
        found.events.extend(reader)
        return reader.num_broken

    num_broken = _attempt(
        found,
        found.folder.events,
        read,
        absent="no stage has begun yet",
        lost="alarms and the course of the run are not shown",
    )
    if num_broken:
        lines = "one line" if num_broken == 1 else f"{num_broken} lines"
        found.problems.append(
            f"events.jsonl has {lines} that a crash or a running write cut; the others are shown"
        )


def _event(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value["event"], str):
        raise ValueError("an event has a name")
    return [value]


def _read_evaluations(found: RunFiles) -> None:
    folder = found.folder
    why = "" if found.is_running or found.summary is None else "the run has ended, so somebody removed it"
    for label in ("before", "after"):
        path = folder.evaluation(label)
        absent = why or (
            "the student has not been evaluated yet" if label == "before" else "training has not ended"
        )
        lost = f"the student {label} training is not shown"
        evaluation = _attempt(found, path, lambda path=path: _evaluation(path), absent=absent, lost=lost)
        if label == "before":
            found.before = evaluation
        else:
            found.after = evaluation
    for path in sorted(folder.evaluations.glob("step-*.parquet")):
        if match := _STEP.fullmatch(path.stem):
            evaluation = _attempt(
                found, path, lambda path=path: _evaluation(path), lost="its point is left out"
            )
            if evaluation is not None:
                found.during.append(Checkpointed(int(match[1]), evaluation))
    found.during.sort(key=lambda each: each.update)


def _evaluation(path: Path) -> Evaluation:
    """Raises: one of the errors above when a column that the report uses is not there or has no numbers."""
    evaluation = load_evaluation(path)
    np.isfinite(evaluation.prompt_indices)
    evaluation.to_dict()
    return evaluation


def _read_answers(found: RunFiles) -> None:
    for label in ("before", "after"):
        path = found.folder.evaluations / f"{label}-answers.json"
        absent = "" if getattr(found, label) is None else "this run has not kept answers"
        rows = _attempt(
            found,
            path,
            lambda path=path: _answers(path),
            absent=absent,
            lost=f"answers {label} training are not shown",
        )
        if rows is not None:
            found.answers[label] = rows


def _answers(path: Path) -> list[dict[str, str]]:
    rows: Sequence[Any] = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(rows, list):
        raise ValueError("it must be a list")
    return [{name: str(row[name]) for name in ("prompt", "teacher", "student")} for row in rows]
