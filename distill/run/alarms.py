"""Signs in a run's numbers that it is not doing what it should, each said once.

Needs the metrics of an update and the evaluations during training, nothing else. Called by the
learner's milestones; the driver shows what is raised, and the events keep it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation import Evaluation, paired_difference

WINDOW = 20
"""Updates over which a mean is taken before anything is said: one batch is noise, and a plain
critic starts at 0."""
WEAK = 0.6
"""Tightness below which a critic is too weak to be believed."""
SIGNIFICANT = 2.0
"""Standard errors, paired by prompt, by which held-out TV must rise to have risen: the gap falls in every
good run, and near the end TV moves by chance."""
DRIFT = 1.1
"""TV in the last third of the student's answers over that in the first, above which text drifts."""


class Alarms:
    """The recent past of a run."""

    def __init__(self) -> None:
        self.raised: dict[str, str] = {}
        """What was said, by kind."""
        self._rows: list[Mapping[str, float]] = []
        self._last: tuple[Evaluation, float | None] | None = None
        """The last evaluation, and the critics' gap in the updates before it."""

    @classmethod
    def resume(
        cls, state: Mapping[str, Any], rows: Sequence[Mapping[str, float]], evaluation: Evaluation | None
    ) -> Alarms:
        """As :meth:`state` was taken. ``rows``: the metrics of the updates until then, or of the last
        ``WINDOW`` of them; ``evaluation``: the one that the state names."""
        alarms = cls()
        alarms.raised = dict(state["raised"])
        alarms._rows = list(rows[-WINDOW:])
        alarms._last = None if evaluation is None else (evaluation, state["gap"])
        return alarms

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; ``evaluation`` is the label of the last one, or null."""
        evaluation, gap = self._last or (None, None)
        return {"raised": self.raised, "evaluation": evaluation and evaluation.label, "gap": gap}

    def after_update(self, row: Mapping[str, float]) -> list[str]:
        """What is to be said after an update; ``row``: its metrics."""
        self._rows = [*self._rows, row][-WINDOW:]
        if len(self._rows) < WINDOW:
            return []
        said: list[str] = []
        for source in ("teacher_text", "student_text"):
            tightness = self._mean(f"critic/{source}.tightness")
            if tightness is not None and tightness < WEAK:
                said += self._once(
                    f"weak_{source}",
                    f"critic/{source}.tightness is {tightness:.2f} over {WINDOW} updates and should be at least "
                    f"{WEAK}: the critic is too weak to be believed; use critic.features=ratio, or raise "
                    "critic.rank, critic.learning_rate or recipe.anchor_weight",
                )
        early, late = (self._mean(f"policy/student_text.tv_{part}") for part in ("early", "late"))
        if early is not None and late is not None and late > DRIFT * early > 0:
            said += self._once(
                "drift",
                f"TV grows along the student's answers, {early:.3f} in the first third and {late:.3f} in the "
                "last: its own text leads it astray; more weight on it (recipe.beta) may pay",
            )
        return said

    def after_evaluation(self, evaluation: Evaluation) -> list[str]:
        """What is to be said after an evaluation during training."""
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
                f"{before[1]:.3f} to {gap:.3f}: the critic is gamed; raise recipe.anchor_weight or critic.rank, "
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
