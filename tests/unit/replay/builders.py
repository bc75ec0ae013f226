"""Builders for the replay tests: an index without a run, groups without rows."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import LearnerConfig, RecipeConfig, ReplayConfig, RunConfig
from distill.interfaces import Draw, GroupRef, Location
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.index import ReplayIndex


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that the tests vary."""

    num_updates: int = 4
    prompts_per_update: int = 2
    teacher_rows_per_update: int = 2
    student_text: str = "every_update"
    teacher_text: str = "sampled"
    student_fraction: float = 0.5
    fraction_step: float = 0.0
    max_policy_age: int = 1
    samples_per_insert: float = 1.0
    max_times_sampled: int = 1
    min_size_to_sample: int = 0
    max_bytes: int = 1 << 40
    num_prompts: int = 7
    num_teacher_rows: int = 5
    seed: int = 3

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            seed=self.seed,
            recipe=RecipeConfig(
                student_text=self.student_text,
                teacher_text=self.teacher_text,
                student_fraction=self.student_fraction,
                fraction_step=self.fraction_step,
            ),
            learner=LearnerConfig(
                num_updates=self.num_updates,
                prompts_per_update=self.prompts_per_update,
                teacher_rows_per_update=self.teacher_rows_per_update,
            ),
            replay=ReplayConfig(
                max_policy_age=self.max_policy_age,
                samples_per_insert=self.samples_per_insert,
                max_times_sampled=self.max_times_sampled,
                min_size_to_sample=self.min_size_to_sample,
                max_bytes=self.max_bytes,
            ),
        )

    @property
    def plan(self) -> BatchPlan:
        return BatchPlan.of(self.config)

    def index(self) -> ReplayIndex:
        return ReplayIndex(
            replay=self.config.replay,
            plan=self.plan,
            student_order=DrawOrder("student_text", self.num_prompts, self.seed),
            teacher_order=DrawOrder("teacher_text", self.num_teacher_rows, self.seed),
            num_updates=self.num_updates,
        )


def open_index(**settings: object) -> ReplayIndex:
    """Return an index after the first push."""
    index = Settings(**settings).index()
    index.advance(0, 1)
    return index


def group(
    draw: Draw, version: int | None = 1, segment: str = "rollout-0.arrow", num_bytes: int = 10
) -> GroupRef:
    """Return a reference to a stored group of the draw."""
    location = Location(node="n", segment=segment, offset=0, num_bytes=num_bytes)
    return GroupRef(draw=draw, location=location, num_rows=2, num_tokens=9, oldest_version=version)


def teacher_group(draw: Draw, segment: str = "teacher-0.arrow", num_bytes: int = 100) -> GroupRef:
    return group(draw, None, segment, num_bytes)


def score_everything(index: ReplayIndex) -> None:
    """Score everything that waits, like a teacher that is never late."""
    while job := index.take_for_scoring(64):
        scored = [group(ref.draw, ref.oldest_version, "teacher-0.arrow", 100) for ref in job.groups]
        index.insert_scored(scored + [teacher_group(draw) for draw in job.teacher_draws])


def fill(index: ReplayIndex, version: int = 1) -> list[Draw]:
    """Roll out and score all admissible draws; returns the student draws."""
    draws = index.admit(1000)
    index.insert([group(draw, version) for draw in draws])
    score_everything(index)
    return draws


def numbers(index: ReplayIndex, update: int, table: str = "student_text") -> list[int]:
    """Return the draw numbers that an update leases."""
    lease = index.lease(update)
    assert lease is not None
    return [ref.draw.number for ref in lease.groups if ref.draw.table == table]


def train(index: ReplayIndex, update: int) -> None:
    """Lease, acknowledge and push one update."""
    assert index.lease(update) is not None
    index.acknowledge(update)
    index.advance(update + 1, update + 2)
