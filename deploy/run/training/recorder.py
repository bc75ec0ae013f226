"""The records of a run: a row of metrics for every update, events, alarms, and what live line and trackers get.

Called by :mod:`deploy.run.training.milestones`. Nothing here computes with tensors.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from deploy.run.tracking.trackers import Trackers
from deploy.run.training.advice import Setup
from deploy.run.training.tracing import RunTrace
from distill.config.tree import flatten
from distill.evaluation import Evaluation, load_evaluation
from distill.interfaces import Lease
from distill.room import NoSpace
from distill.run.alarms import Alarms
from distill.run.folder import RunFolder
from distill.run.ledger_file import LedgerFile
from distill.run.metrics import EventLog, MetricsWriter, ReportFacts, read_metrics


class Recorder:
    """Writes what happens in a run folder, and reports it to the live line and the trackers."""

    def __init__(
        self,
        folder: RunFolder,
        alarms: Alarms,
        report: ReportFacts,
        setup: Setup,
        trackers: Trackers,
        trace: RunTrace,
        rows: Mapping[str, int],
    ) -> None:
        """``trackers`` and ``trace``: their owner closes them. ``rows``: of the tables from which draws select."""
        self.report = report
        self.alarms = alarms
        self.trace = trace
        self._setup = setup
        self._trackers = trackers
        self._metrics = MetricsWriter(folder.path)
        self._events = EventLog(folder.path)
        self._ledger = LedgerFile(folder.ledger, folder.incarnation, rows)
        self._since = time.monotonic()

    def start(self, updates_done: int) -> None:
        """Drop the rows of updates that are made again. Raises: NoSpace; it may be repeated."""
        self._metrics.truncate(updates_done)
        self._ledger.start(updates_done)

    def note_start(self, updates_done: int, policy_version: int) -> None:
        """Note where training starts."""
        self.event(
            "training_started",
            updates_done=updates_done,
            policy_version=policy_version,
            setup=vars(self._setup),
        )
        self.report(setup=self._setup)

    def start_clock(self) -> None:
        """An update's seconds count from here: evaluations and checkpoints are not part of them."""
        self._since = time.monotonic()

    def note_draws(self, updates_done: int, lease: Lease) -> None:
        """Write which draws an update has used. Raises: NoSpace; it may be repeated."""
        self._ledger.update(updates_done, lease)

    def update(self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]) -> None:
        """Write the row of an update. ``metrics``: its own, and the counters of all actors."""
        row = dict(metrics)
        if ages := lease.policy_ages:
            row["policy/age_max"] = float(max(ages))
            row["policy/age_mean"] = sum(ages) / len(ages)
        row["policy/version"] = float(policy_version)
        row["timing/update_s"] = time.monotonic() - self._since
        self._metrics.write(updates_done, row)
        self._trackers.log_numbers(updates_done, row)
        self.trace.counters(updates_done, row)
        self._raise(updates_done, self.alarms.after_update(row))
        self.report(
            update=updates_done, policy_version=policy_version, policy_age=max(ages, default=0), row=row
        )

    def measured(self, updates_done: int, evaluation: Evaluation) -> None:
        """Record the numbers of an evaluation."""
        summary = evaluation.to_dict()
        self.event("evaluated", label=evaluation.label, **summary)
        self._trackers.log_numbers(
            updates_done, {f"evaluation/{name}": value for name, value in flatten(summary).items()}
        )

    def evaluated(self, updates_done: int, evaluation: Evaluation) -> None:
        """Raise the alarms of an evaluation during training."""
        self._raise(updates_done, self.alarms.after_evaluation(evaluation))

    def event(self, name: str, **fields: Any) -> None:
        self._events.write(name, **fields)

    def flush(self) -> None:
        """Make every row, and what is known of every draw, durable. Raises: NoSpace; it may be repeated."""
        self._metrics.flush()
        self._ledger.sync()

    def close(self) -> None:
        with suppress(NoSpace):  # a full disk is no reason to hide what ended the run
            self._metrics.close()
        self._events.close()
        self._ledger.close()

    def _raise(self, update: int, messages: Sequence[str]) -> None:
        for message in messages:
            self.event("alarm", update=update, message=message)
            self._trackers.log_text(update, "alarm", message)
        self.report(alarms=list(self.alarms.raised.values()))


def resumed_alarms(folder: RunFolder, state: dict[str, Any]) -> Alarms:
    """The alarms of a checkpoint's state, with the rows that the run folder has of the updates before it."""
    rows = [
        {name: value for name, value in row.items() if value is not None}
        for row in read_metrics(folder.path).to_pylist()
        if row["update"] <= state["updates_done"]
    ]
    label = state["alarms"]["evaluation"]
    return Alarms.resume(state["alarms"], rows, label and load_evaluation(folder.evaluation(label)))
