"""Builders for the replay tests: an index without a run, samples without rows, an actor that is never late."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import LearnerConfig, RecipeConfig, ReplayConfig, RunConfig
from distill.interfaces import Draw, GroupRef, Holder, Location, SampleRef, Work
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.index import ReplayIndex
from distill.replay.ledger import Shares

ROLLOUT, TEACHER = Holder("rollout", 0), Holder("teacher", 0)
"""The actors of tests that need only one of each kind."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that the tests vary."""

    num_updates: int = 4
    prompts_per_update: int = 2
    samples_per_prompt: int = 1
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
    num_rollouts: int = 1
    num_scorers: int = 1
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
            samples_per_prompt=self.samples_per_prompt,
            pools=Shares(rollout=self.num_rollouts, scoring=self.num_scorers),
        )


def open_index(**settings: object) -> ReplayIndex:
    """Return an index after the first push."""
    index = Settings(**settings).index()
    index.advance(0, 1)
    return index


def sample(
    draw: Draw,
    version: int | None = 1,
    segment: str = "rollout-0.0-0.arrow",
    num_bytes: int = 10,
    number: int = 0,
    offset: int = 0,
) -> SampleRef:
    """Return a reference to a stored sample of the draw."""
    location = Location(node="n", segment=segment, offset=offset, num_bytes=num_bytes, trajectory_id="t")
    return SampleRef(draw=draw, sample=number, location=location, num_tokens=9, oldest_version=version)


def scored(
    work: Work, segment: str = "teacher-0.0-0.arrow", num_bytes: int = 100, offset: int = 0
) -> SampleRef:
    """Return what a teacher actor makes of its work."""
    if isinstance(work, SampleRef):
        return sample(work.draw, work.oldest_version, segment, num_bytes, work.sample, offset)
    return sample(work, None, segment, num_bytes, offset=offset)


def admitted(index: ReplayIndex, room: int = 1000, holder: Holder = ROLLOUT) -> list[Draw]:
    """Return the draws that a rollout actor gets."""
    return [work for work in index.take(holder, room) if isinstance(work, Draw)]


def insert(index: ReplayIndex, draws: list[Draw], version: int = 1, holder: Holder = ROLLOUT) -> None:
    """Deliver one sample of each draw."""
    assert index.deliver(holder, [sample(draw, version) for draw in draws]) == []


def score_everything(index: ReplayIndex) -> None:
    """Score everything that waits, like a teacher that is never late."""
    while work := index.take(TEACHER, 64):
        assert index.deliver(TEACHER, [scored(each) for each in work]) == []


def fill(index: ReplayIndex, version: int = 1) -> list[Draw]:
    """Roll out and score all admissible draws; returns the student draws."""
    draws = admitted(index)
    insert(index, draws, version)
    score_everything(index)
    return draws


def numbers(index: ReplayIndex, update: int, table: str = "student_text") -> list[int]:
    """Return the draw numbers that an update leases."""
    lease = index.lease(update)
    assert lease is not None
    return draw_numbers(lease.groups, table)


def draw_numbers(groups: tuple[GroupRef, ...], table: str = "student_text") -> list[int]:
    return [group.draw.number for group in groups if group.draw.table == table]


def train(index: ReplayIndex, update: int) -> None:
    """Lease, acknowledge and push one update."""
    assert index.lease(update) is not None
    index.acknowledge(update)
    index.advance(update + 1, update + 2)
