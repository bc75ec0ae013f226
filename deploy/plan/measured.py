"""What a run has measured of its devices, from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.plan.load import Load, Service
from deploy.report.run_files import RunFiles
from deploy.run.training.advice import Setup
from distill.config import RunConfig
from distill.config.tree import flat_settings
from distill.errors import ConfigError
from distill.replay.draws import BatchPlan

FIRST = 1
"""The first updates are slower, because kernels are chosen and pages are touched. They do not count."""
_DECIDE = (
    "teacher.model", "student.model", "student.init", "recipe.name", "critic.", "data.path",
    "data.max_prompt_tokens", "corpus.max_new_tokens", "rollout.max_new_tokens", "rollout.engine", "rollout.dtype",
    "rollout.tensor_parallel_size", "scoring.engine", "scoring.dtype", "scoring.tensor_parallel_size",
    "learner.device", "learner.precision",
)  # fmt: skip
"""Settings (or the beginnings of their names) that decide how much work a text is."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of one engine, and of the learner, for each piece of work of a run."""

    config: RunConfig
    setup: Setup | None
    sample_s: float
    """Of a rollout engine, for one sample."""
    text_s: float
    """Of a scoring engine, for one text."""
    row_s: float
    """Of the learner, for one row of an update."""
    push_s: float
    between_s: float
    """In lock-step: the part of an update in which no stage works."""
    tokens_per_sample: float
    num_updates: int

    def load(self, config: RunConfig, num_threads: Mapping[str, int]) -> Load:
        """The load of another configuration of the same models on devices as they were measured.

        ``num_threads``: of one actor of each stage that computes on cores. An engine with half the threads takes twice
        as long.

        Raises: ConfigError when the configuration has other models, texts or engines.
        """
        self._require_same_work(config)
        measured = self.setup.num_threads if self.setup is not None else {}

        def slower(stage: str) -> float:
            return (
                measured.get(stage, 1) / num_threads[stage]
                if measured.get(stage) and num_threads.get(stage)
                else 1.0
            )

        return Load(
            config=config,
            rollout=Service(self.sample_s * slower("rollout")),
            teacher=Service(self.text_s * slower("teacher")),
            update=Service(self.row_s * slower("learner")),
            push_s=self.push_s,
            between_s=self.between_s,
        )

    def _require_same_work(self, config: RunConfig) -> None:
        ours, theirs = flat_settings(self.config), flat_settings(config)
        for name in ours:
            if name.startswith(_DECIDE) and theirs.get(name) != ours[name]:
                raise ConfigError(
                    name,
                    theirs.get(name),
                    f"be as in the run that was measured, {ours[name]}",
                    "name a run of the same models and texts with --measured, or leave --measured out",
                )


def measured(run: RunFiles, config: RunConfig) -> Measured:
    """Read what a run has measured. ``config``: the run's.

    Raises: ConfigError when it has too few updates, or was written before its numbers were recorded.
    """
    counts = _Differences(run)
    counts.leave_out(_first_updates(run))
    if config.replay.lock_step:  # an evaluation between two updates has work of its own
        counts.leave_out(_updates_after_evaluations(run))
    counts.require()
    num_samples, num_texts = counts.total("rollout/num_samples"), counts.total("teacher/num_texts")
    rollout_s, teacher_s = counts.total("timing/rollout_busy_s"), counts.total("timing/teacher_busy_s")
    learner_s = counts.mean_of_update("timing/learner_busy_s")
    between_s = 0.0
    if config.replay.lock_step:
        parts_s = rollout_s / config.rollout.replicas + teacher_s / config.scoring.replicas
        whole_s = counts.mean_of_update("timing/update_s")
        between_s = (
            whole_s - parts_s / counts.num_updates - learner_s - counts.mean_of_update("timing/push_s")
        )
    return Measured(
        config=config,
        setup=run.setup,
        sample_s=rollout_s / num_samples if num_samples else 0.0,
        text_s=teacher_s / num_texts if num_texts else 0.0,
        row_s=learner_s / _rows(config),
        push_s=counts.mean_of_update("timing/push_s"),
        between_s=max(0.0, between_s),
        tokens_per_sample=counts.total("rollout/num_tokens") / num_samples if num_samples else 0.0,
        num_updates=counts.num_updates,
    )


def _first_updates(run: RunFiles) -> list[int]:
    """The first update of each start, in which the actors' counters begin again."""
    starts = [event.get("updates_done") for event in run.events if event.get("event") == "training_started"]
    return [done + 1 for done in starts if isinstance(done, int)]


def _updates_after_evaluations(run: RunFiles) -> list[int]:
    """The updates that an evaluation during training precedes; its label is step-N."""
    labels = [str(event.get("label")) for event in run.events if event.get("event") == "evaluated"]
    steps = [label.removeprefix("step-") for label in labels if label.startswith("step-")]
    return [int(step) + 1 for step in steps if step.isdecimal()]


def _rows(config: RunConfig) -> float:
    """Rows of an update, on average."""
    plan, updates = BatchPlan.of(config), config.learner.num_updates
    student = plan.student_through(updates) * config.rollout.samples_per_prompt
    return (student + plan.teacher_through(updates)) / updates


class _Differences:
    """The counters of a run's rows as differences between updates."""

    def __init__(self, run: RunFiles) -> None:
        self._run = run
        self._updates = run.metrics.get("update", np.zeros(0))[FIRST + 1 :]
        self._kept = np.ones(len(self._updates), dtype=bool)

    def leave_out(self, updates: Sequence[int]) -> None:
        """Do not count these updates."""
        self._kept &= ~np.isin(self._updates, updates)

    @property
    def num_updates(self) -> int:
        return int(self._kept.sum())

    def require(self) -> None:
        """Raises: ConfigError when no update counts, or a column is missing."""
        path = self._run.folder.path
        if self.num_updates == 0:
            must = f"have an update after the first {FIRST + 1} that no evaluation precedes"
            raise ConfigError(
                "--measured", path, must, "name a run with more updates, or leave --measured out"
            )
        for name in ("teacher/num_texts", "rollout/num_samples", "timing/learner_busy_s", "timing/push_s"):
            if name not in self._run.metrics:
                must = f"have the column {name} in its metrics"
                raise ConfigError(
                    "--measured", path, must, "name a run of this version, or leave --measured out"
                )

    def of(self, name: str) -> np.ndarray:
        """What each update after the first ones added to a counter."""
        values = self._run.metrics.get(name)
        if values is None:
            return np.zeros(len(self._kept))
        return np.diff(np.nan_to_num(values[FIRST:]))

    def total(self, name: str) -> float:
        return float(self.of(name)[self._kept].sum())

    def mean_of_update(self, name: str) -> float:
        """The mean of a column whose values are those of single updates."""
        values = self._run.metrics.get(name)
        if values is None or not self.num_updates:
            return 0.0
        return float(np.nan_to_num(values[FIRST + 1 :])[self._kept].mean())
