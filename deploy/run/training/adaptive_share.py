"""DistiLLM's share of student text, which grows when the student gets worse on held-out text.

Ko et al., 2024, "adaptive SGO scheduler": the share starts low and grows by ``fraction_step`` when the
validation loss exceeds, by ``fraction_tolerance``, the one at which the share last changed. The
validation loss is forward KL on the teacher's held-out text, which differs from cross-entropy on that
text by a constant. Called by :mod:`deploy.run.training.milestones`.
"""

from __future__ import annotations

from typing import Any

from distill.config import RecipeConfig
from distill.evaluation import Evaluation, load_evaluation, paired_difference
from distill.run.folder import RunFolder

_LOSS = "teacher_text.forward_kl"


class AdaptiveShare:
    """The share, and the label of the evaluation at which it last changed."""

    def __init__(self, recipe: RecipeConfig, folder: RunFolder, state: dict[str, Any] | None = None) -> None:
        """``state``: that of a checkpoint, see :meth:`state`."""
        self._recipe = recipe
        self._folder = folder
        self.share = state["share"] if state else recipe.student_fraction
        self._set_at = state["set_at"] if state else "before"

    def after_evaluation(self, evaluation: Evaluation) -> float | None:
        """The new share if it grows, otherwise None."""
        if not self._recipe.adapts_fraction or self.share >= 1:
            return None
        before = load_evaluation(self._folder.evaluation(self._set_at))
        rise = paired_difference(before, evaluation)[_LOSS].value
        if rise < self._recipe.fraction_tolerance:
            return None
        self.share = min(1.0, round(self.share + self._recipe.fraction_step, 9))
        self._set_at = evaluation.label
        return self.share

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON."""
        return {"share": self.share, "set_at": self._set_at}
