"""What the learner does with an update whose numbers are not finite: the file of it, then the end or a skip.

A failed update has changed nothing (:meth:`learner.distiller.Distiller.train_on`). With ``learner.on_nonfinite=skip`` it
counts as done all the same: its number is used, so the schedules and the slices of the critics go on, and its draws are
used, so the ledger has exactly the draws that a run without the failure has, and `distill audit` has nothing to
tell apart. The push that follows sends the same weights under a new version.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from distill.errors import Diverged, first_line
from distill.run.folder import RunFolder
from learner.distiller import Distiller
from learner.process.update_file import About, write_update

COUNTER = "learner/num_nonfinite"
"""The metric: updates that the run has skipped."""


class Skips:
    """The updates that a run has skipped, and the rule for the next one."""

    def __init__(self, distiller: Distiller, folder: RunFolder, run_id: str, num_skipped: int) -> None:
        """``num_skipped``: those until the checkpoint that the learner loaded."""
        self._distiller = distiller
        self._folder = folder
        self._run_id = run_id
        self.num_skipped = num_skipped
        self.newest: dict[str, Any] | None = None
        """The newest one as fields of an event."""

    def update(self, rows: Sequence[pa.RecordBatch], policy_version: int) -> dict[str, float]:
        """One update of the distiller, which may be skipped; returns its metrics with :data:`COUNTER`.

        ``policy_version``: that of the weights that it begins with.

        Raises: Diverged, with the update, its draws and how to replay it, when it may not be skipped.
        """
        try:
            metrics = self._distiller.update(rows)
        except Diverged as error:
            self._take(error, rows, policy_version)
            metrics = self._distiller.skip(rows)
        return metrics | {COUNTER: float(self.num_skipped)}

    def _take(self, error: Diverged, rows: Sequence[pa.RecordBatch], policy_version: int) -> None:
        """Write the file of a failed update, and count it. Raises: Diverged when the run must end."""
        update, settings = self._distiller.updates_done + 1, self._distiller.config.learner
        about = About(
            run_id=self._run_id,
            update=update,
            policy_version=policy_version,
            stage=error.stage,
            error=error.statement,
            trajectories=tuple(name for row in rows for name in row.column("trajectory_id").to_pylist()),
        )
        try:
            file = str(
                write_update(self._folder.nonfinite, about, self._distiller, self._distiller.batch(rows))
            )
            replay = f"`distill replay-batch {shlex.quote(file)}` says which tensor was the first"
        except OSError as problem:  # a full disk is no reason to say less about the failure itself
            file = None
            replay = f"its batch could not be written ({first_line(problem)})"
        draws = _draws([name for row in rows for name in row.column("draw_id").to_pylist()])
        where = f"update {update}, stage {error.stage}, weights of version {policy_version}, draws {draws}"
        if settings.on_nonfinite == "stop":
            remedy = f"{replay}; {error.remedy}, or resume with learner.on_nonfinite=skip"
            raise Diverged(f"{where}: {error.name}", error.value, error.must, remedy) from error
        if self.num_skipped >= settings.max_nonfinite:
            must = f"{error.must}, because learner.max_nonfinite={settings.max_nonfinite} updates have been skipped"
            raise Diverged(
                f"{where}: {error.name}", error.value, must, f"{replay}; {error.remedy}"
            ) from error
        self.num_skipped += 1
        self.newest = {
            "update": update,
            "policy_version": policy_version,
            "stage": error.stage,
            "error": error.statement,
            "draws": draws,
            "file": file,
        }


def _draws(names: Sequence[str]) -> str:
    """The draws of a batch for a message: consecutive ones as ``student_text-0-8 to 15``."""
    distinct = list(dict.fromkeys(names))
    keys = [(name.rpartition("-")[0], int(name.rpartition("-")[2])) for name in distinct]
    parts: list[str] = []
    for (prefix, _), run in itertools.groupby(
        enumerate(sorted(keys)), key=lambda each: (each[1][0], each[1][1] - each[0])
    ):
        numbers = [number for _, (_, number) in run]
        last = f" to {numbers[-1]}" if len(numbers) > 1 else ""
        parts.append(f"{prefix}-{numbers[0]}{last}")
    return ", ".join(parts)
