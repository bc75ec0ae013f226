"""What a simulated run consists of, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill.config import LearnerConfig, RecipeConfig, ReplayConfig, RolloutConfig, RunConfig, ScoringConfig
from distill.config.tree import with_settings
from distill.replay.draws import BatchPlan

_SHORTEST_S = 1e-9


@dataclass(frozen=True)
class Service:
    """The time that a device needs for its work: ``fixed_s + each_s * n`` seconds for ``n`` texts together.

    A decoding step has both parts. Reading the weights from memory costs the same for every number of texts, and the
    arithmetic grows with it.
    """

    each_s: float
    fixed_s: float = 0.0

    def seconds(self, num_together: float) -> float:
        return max(_SHORTEST_S, self.fixed_s + self.each_s * num_together)


@dataclass(frozen=True, kw_only=True)
class Load:
    """A configuration, and how long each of its devices needs."""

    config: RunConfig
    rollout: Service
    """Of one rollout engine, for samples."""
    teacher: Service
    """Of one scoring engine, for texts."""
    update: Service
    """Of the learner, for the rows of an update."""
    push_s: float
    between_s: float = 0.0
    """In lock-step: the part of an update in which no stage works."""

    @property
    def rates(self) -> dict[str, float]:
        """Updates per second that each stage could do alone, with full engines."""
        config, plan = self.config, BatchPlan.of(self.config)
        updates = config.learner.num_updates
        samples = plan.student_through(updates) / updates * config.rollout.samples_per_prompt
        texts = samples + plan.teacher_through(updates) / updates
        rates = {"learner": 1 / self.update.seconds(texts)}
        for stage, service, engine, work in (
            ("rollout", self.rollout, config.rollout, samples),
            ("teacher", self.teacher, config.scoring, texts),
        ):
            together = engine.max_num_seqs
            rate = engine.replicas * together / service.seconds(together)
            rates[stage] = rate / work if work else float("inf")
        return rates

    def changed(self, changes: Mapping[str, Any]) -> Load:
        """The load with other settings, by their dotted names of two parts. The services stay."""
        return replace(self, config=with_settings(self.config, changes))


def waiting_config(
    *, num_rollouts: int, num_teachers: int, prompts_per_update: int, num_updates: int, max_policy_age: int
) -> RunConfig:
    """A run whose engines have one text at a time, with the student's text alone and one sample for each prompt."""
    return RunConfig(
        recipe=RecipeConfig(student_text="every_update", teacher_text="none"),
        learner=LearnerConfig(num_updates=num_updates, prompts_per_update=prompts_per_update),
        replay=ReplayConfig(max_policy_age=max_policy_age),
        rollout=RolloutConfig(samples_per_prompt=1, replicas=num_rollouts, max_num_seqs=1),
        scoring=ScoringConfig(replicas=num_teachers, max_num_seqs=1),
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated run took while its pipeline was full: in the middle half of its updates."""

    updates_per_s: float
    samples_per_s: float
    """Of the student, in the updates."""
    row: Mapping[str, float]
    """Busy shares and numbers of actors of the same time, by the names of ``metrics.parquet``."""
