"""What a simulated run consists of, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill.config import LearnerConfig, RecipeConfig, ReplayConfig, RolloutConfig, RunConfig, ScoringConfig

_SHORTEST_S = 1e-9


@dataclass(frozen=True)
class Service:
    """The time that an engine needs for its work: ``fixed_s + each_s * n`` seconds for ``n`` trajectories together.

    A decoding step has both parts. Reading the weights from memory costs the same for every number of texts, and the
    arithmetic grows with it.
    """

    each_s: float
    fixed_s: float = 0.0

    def seconds(self, num_together: int) -> float:
        return max(_SHORTEST_S, self.fixed_s + self.each_s * num_together)


@dataclass(frozen=True, kw_only=True)
class Load:
    """How many engines there are, and how long each piece of work takes."""

    num_rollouts: int
    num_teachers: int
    prompts_per_update: int
    num_updates: int
    """At least two: the first quarter of them does not count."""
    max_policy_age: int
    rollout: Service
    """Of one rollout engine; without rollouts, of none."""
    teacher: Service
    update_s: float
    push_s: float
    rollout_capacity: int = 1
    """Trajectories that an engine has at a time. In lock-step it has its whole share at once."""
    teacher_capacity: int = 1

    @property
    def lock_step(self) -> bool:
        return self.max_policy_age == 0

    @property
    def rates(self) -> dict[str, float]:
        """Trajectories per second that each stage could do alone, with full engines."""
        return {
            "rollout": _rate(self.num_rollouts, self.rollout, self.rollout_capacity),
            "teacher": _rate(self.num_teachers, self.teacher, self.teacher_capacity),
            "learner": self.prompts_per_update / self.update_s if self.update_s else float("inf"),
        }

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            recipe=RecipeConfig(student_text="every_update", teacher_text="none"),
            learner=LearnerConfig(num_updates=self.num_updates, prompts_per_update=self.prompts_per_update),
            replay=ReplayConfig(max_policy_age=self.max_policy_age),
            rollout=RolloutConfig(samples_per_prompt=1, replicas=self.num_rollouts),
            scoring=ScoringConfig(replicas=self.num_teachers),
        )


def _rate(num_engines: int, service: Service, capacity: int) -> float:
    return num_engines * capacity / service.seconds(capacity)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated run took."""

    trajectories_per_s: float
    """Without the time in which the pipeline fills."""
    row: Mapping[str, float]
    """Busy shares and numbers of actors of the same time, by the names of ``metrics.parquet``."""
