"""Alarms: signs in a run's numbers that training goes wrong, each raised once.

They need only the metrics of the updates and the evaluations during training. The learner's
milestones call them; the driver shows each alarm, and the event log keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation import Evaluation, paired_difference

WINDOW = 20
"""Number of updates that a mean covers before an alarm can be raised, because one batch is noise and
a plain critic starts at 0."""
WEAK = 0.6
"""Tightness below which a critic is too weak to be trusted."""
SIGNIFICANT = 2.0
"""Number of standard errors, paired by prompt, that a rise of held-out TV must exceed: the gap falls in
every good run, and near the end TV moves by chance."""
DRIFT = 1.1
"""Ratio of TV in the last third of the student's responses to TV in the first, above which they drift."""


class Alarms:
    """The recent past of a run."""

    def __init__(self) -> None:
        self.raised: dict[str, str] = {}
        """The message of every alarm raised so far, by kind."""
        self._rows: list[Mapping[str, float]] = []
        self._last: tuple[Evaluation, float | None] | None = None
        """The last evaluation, and the gap of the critic on teacher text in the updates before it."""

    @classmethod
    def resume(
        cls, state: Mapping[str, Any], rows: Sequence[Mapping[str, float]], evaluation: Evaluation | None
    ) -> Alarms:
        """Restore what :meth:`state` returned. ``rows``: the metrics of the updates until then, at least
        of the last ``WINDOW``; ``evaluation``: the one that the state names."""
        alarms = cls()
        alarms.raised = dict(state["raised"])
        alarms._rows = list(rows[-WINDOW:])
        alarms._last = None if evaluation is None else (evaluation, state["gap"])
        return alarms

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON; ``evaluation`` is the last one's label, or null."""
        evaluation, gap = self._last or (None, None)
        return {"raised": self.raised, "evaluation": evaluation and evaluation.label, "gap": gap}

    def after_update(self, row: Mapping[str, float]) -> list[str]:
        """Return the alarms that an update raises; ``row``: its metrics."""
        self._rows = [*self._rows, row][-WINDOW:]
        raised: list[str] = []
        if row.get("learner/num_nonfinite", 0) > 0:
            raised += self._once(
                "nonfinite",
                "an update was skipped, because its numbers were not finite: `update_skipped` in events.jsonl names it and "
                "its file, with which `distill replay-batch` says which tensor was the first",
            )
        if len(self._rows) < WINDOW:
            return raised
        for text in ("teacher_text", "student_text"):
            tightness = self._mean(f"critic/{text}.tightness")
            if tightness is not None and tightness < WEAK:
                raised += self._once(
                    f"weak_{text}",
                    f"critic/{text}.tightness is {tightness:.2f} over {WINDOW} updates and should be at least "
                    f"{WEAK}: the critic is too weak to be trusted; use critic.features=ratio, or raise "
                    "critic.rank, critic.learning_rate or recipe.anchor_weight",
                )
        early, late = (self._mean(f"policy/student_text.tv_{part}") for part in ("early", "late"))
        if early is not None and late is not None and late > DRIFT * early > 0:
            raised += self._once(
                "drift",
                f"TV grows along the student's responses, from {early:.3f} in the first third to {late:.3f} in the "
                "last: the student's own text leads it astray; raise recipe.beta to give that text more weight",
            )
        return raised

    def after_evaluation(self, evaluation: Evaluation) -> list[str]:
        """Return the alarms that an evaluation during training raises."""
        gap = self._mean("critic/teacher_text.d_mm")
        before, self._last = self._last, (evaluation, gap)
        if before is None or before[1] is None or gap is None or gap >= before[1]:
            return []
        rise = paired_difference(before[0], evaluation)["teacher_text.tv"]
        if rise.value > SIGNIFICANT * rise.stderr:
            tv = evaluation.value("teacher_text.tv")
            return self._once(
                "gamed",
                f"held-out TV rose from {tv - rise.value:.3f} to {tv:.3f} while the critic's gap fell from "
                f"{before[1]:.3f} to {gap:.3f}: the student games the critic; raise recipe.anchor_weight or critic.rank, "
                "or lower learner.learning_rate",
            )
        return []

    def _mean(self, name: str) -> float | None:
        values = [row[name] for row in self._rows if name in row]
        return sum(values) / len(values) if values else None

    def _once(self, kind: str, message: str) -> list[str]:
        if kind in self.raised:
            return []
        self.raised[kind] = message
        return [message]
