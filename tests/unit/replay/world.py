"""A run around a replay index without engines: actors, a learner and their deaths, in any order.

It keeps records of its own (plain lists and dictionaries that never come from the index) and checks
every result of the index against them.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter

from distill.interfaces import Draw, GroupRef, Lease, ScoringJob
from tests.unit.replay.builders import Settings, group

GROUPS_PER_SEGMENT = 3


class World:
    """One run. ``step`` takes one random action; ``finish`` schedules all actions fairly until the end."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings = settings
        self.random = random.Random(seed)
        self.index = settings.index()
        self.in_order = settings.max_policy_age == 0 or settings.max_times_sampled == 1
        self.live_version = 0
        self.true_updates = {0: 0}
        self.updates = 0  # applied by the learner
        self.live_updates = 0  # of the weights in the engines
        self.uses: dict[int, Lease] = {}  # of updates that no restart has undone
        self.durable = (0, self.index.state())
        self.committed = 0
        self.pending: list[tuple[int, dict]] = []
        self.admissions: list[tuple[int, ...]] = []
        self.jobs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.forget_actors()
        self.push()

    def forget_actors(self) -> None:
        self.rollouts: list[tuple[Draw, int]] = []
        self.scorings: list[ScoringJob] = []
        self.admitted: set[int] = set()
        self.busy: set[int] = set()
        self.lease: Lease | None = None
        self.leased: dict[int, Lease] = {}
        self.most_live_updates = 0  # a learner that went back does not revoke admissions
        self.incarnation = getattr(self, "incarnation", -1) + 1
        self.appended: Counter[str] = Counter()
        self.deleted: set[str] = set()

    # Actions

    def admit(self) -> bool:
        draws = self.index.admit(self.random.randint(1, 5))
        numbers = [draw.number for draw in draws]
        trained = {n for use in self.uses.values() if use.update < self.updates for n in students(use)}
        assert not self.busy.intersection(numbers), "two actors have one draw"
        assert not (trained & set(numbers)), "a trained draw is issued again"
        self.busy.update(numbers)
        self.admitted.update(numbers)
        if self.in_order:
            assert len(self.admitted | trained) <= self.bound()
            assert self.admitted | trained == set(range(len(self.admitted | trained))), "a draw is skipped"
        self.rollouts += [(draw, self.live_version) for draw in draws]
        if draws:
            self.admissions.append(tuple(numbers))
        return bool(draws)

    def bound(self) -> int:
        settings = self.settings
        horizon = min(self.most_live_updates + settings.max_policy_age + 1, settings.num_updates)
        needed = settings.plan.student_through(horizon)
        by_updates = math.ceil(needed / settings.samples_per_insert)
        return max(by_updates, min(settings.min_size_to_sample, needed))

    def insert(self) -> bool:
        self.random.shuffle(self.rollouts)
        done, self.rollouts = self.split(self.rollouts)
        self.index.insert([self.store(draw, "rollout", self.random.choice([since, self.live_version]))
                           for draw, since in done])  # fmt: skip
        self.busy.difference_update(draw.number for draw, _ in done)
        return bool(done)

    def store(self, draw: Draw, writer: str, version: int | None) -> GroupRef:
        number = sum(n for name, n in self.appended.items() if name.startswith(writer))
        segment = f"{writer}-{self.incarnation}-{number // GROUPS_PER_SEGMENT}.arrow"
        self.appended[segment] += 1
        return group(draw, version, segment, self.random.randint(1, 50))

    def split(self, things: list) -> tuple[list, list]:
        count = self.random.randint(0, len(things))
        return things[:count], things[count:]

    def take(self) -> bool:
        job = self.index.take_for_scoring(self.random.randint(1, 6))
        assert not self.deleted.intersection(ref.location.segment for ref in job.groups)
        if job:
            self.scorings.append(job)
            self.jobs.append((tuple(ref.draw.number for ref in job.groups),
                              tuple(draw.number for draw in job.teacher_draws)))  # fmt: skip
        return bool(job)

    def score(self) -> bool:
        if not self.scorings:
            return False
        job = self.scorings.pop(self.random.randrange(len(self.scorings)))
        scored = [self.store(ref.draw, "teacher", ref.oldest_version) for ref in job.groups]
        self.index.insert_scored(scored + [self.store(draw, "teacher", None) for draw in job.teacher_draws])
        return True

    def take_lease(self) -> bool:
        if self.updates >= self.settings.num_updates or self.live_updates != self.updates:
            return False
        lease = self.index.lease(self.updates)
        if lease is not None:
            assert self.leased.setdefault(self.updates, lease) == lease, "a lease changed"
            self.check(lease)
        self.lease = lease
        return lease is not None

    def check(self, lease: Lease) -> None:
        settings, plan, update = self.settings, self.settings.plan, lease.update
        used = students(lease)
        teacher_rows = [ref.draw.number for ref in lease.groups if ref.draw.table == "teacher_text"]
        assert [ref.draw.table for ref in lease.groups] == ["student_text"] * len(used) + [
            "teacher_text"
        ] * len(teacher_rows)
        assert teacher_rows == list(range(plan.teacher_through(update), plan.teacher_through(update + 1)))
        assert len(set(used)) == len(used) == plan.student_groups(update)
        assert used == sorted(used)
        if self.in_order:
            assert used == list(range(plan.student_through(update), plan.student_through(update + 1)))
        assert len(lease.policy_ages) == len(used)
        for ref, age in zip(lease.groups, lease.policy_ages, strict=False):
            assert update - self.true_updates[ref.oldest_version] <= age <= settings.max_policy_age
        assert not self.deleted.intersection(ref.location.segment for ref in lease.groups)
        counts = Counter(n for use in self.uses.values() if use.update < update for n in students(use))
        assert all(counts[n] < settings.max_times_sampled for n in used)

    def apply(self) -> bool:
        if self.lease is None:
            return False
        self.index.acknowledge(self.updates)
        self.uses[self.updates] = self.lease
        self.updates += 1
        self.lease = None
        return True

    def push(self) -> bool:
        """The engines get the weights before the index is notified."""
        version = max(self.true_updates) + 1
        self.true_updates[version] = self.updates
        self.live_version = version
        if self.random.random() < 0.3:
            self.insert()
        self.index.advance(self.updates, version)
        self.live_updates = self.updates
        self.most_live_updates = max(self.most_live_updates, self.updates)
        return True

    def publish(self) -> bool:
        return self.live_updates < self.updates and self.push()

    def checkpoint(self) -> bool:
        if self.updates <= max([self.committed, *(updates for updates, _ in self.pending)]):
            return False
        self.pending.append((self.updates, json.loads(json.dumps(self.index.state()))))
        return True

    def commit(self) -> bool:
        if not self.pending:
            return False
        self.durable = self.pending.pop(0)
        self.committed = self.durable[0]
        self.index.commit(self.committed)
        return True

    def collect(self) -> bool:
        for writer in ("rollout", "teacher"):
            for segment, seen in self.index.freed_segments(f"{writer}-{self.incarnation}").items():
                if seen == self.appended[segment] == GROUPS_PER_SEGMENT:
                    self.deleted.add(segment)
        return False

    # Deaths

    def kill_rollout_actor(self) -> bool:
        self.random.shuffle(self.rollouts)
        lost, self.rollouts = self.split(self.rollouts)
        ids = [draw.draw_id for draw, _ in lost]
        assert self.index.requeue(ids, self.random.choice([None, "rollout"])) == len(lost)
        self.busy.difference_update(draw.number for draw, _ in lost)
        return False

    def kill_teacher(self) -> bool:
        if self.scorings:
            job = self.scorings.pop()
            ids = [ref.draw.draw_id for ref in job.groups] + [draw.draw_id for draw in job.teacher_draws]
            assert self.index.requeue(ids, self.random.choice([None, "scoring"])) == len(ids)
        return False

    def restart_learner(self) -> bool:
        """Restart the learner from its durable checkpoint; actors and index continue."""
        self.back_to_checkpoint()
        self.lease = None
        self.push()
        return False

    def crash(self) -> bool:
        """Kill everything; only the durable checkpoint survives."""
        self.back_to_checkpoint()
        self.forget_actors()
        self.index = self.settings.index()
        self.index.load_state(self.durable[1])
        self.push()
        return False

    def back_to_checkpoint(self) -> None:
        self.updates = self.live_updates = self.durable[0]
        self.uses = {update: lease for update, lease in self.uses.items() if update < self.updates}
        self.pending = []

    # Schedules

    WORK = (
        "admit",
        "insert",
        "take",
        "score",
        "take_lease",
        "apply",
        "publish",
        "checkpoint",
        "commit",
        "collect",
    )
    DEATHS = ("kill_rollout_actor", "kill_teacher", "restart_learner", "crash")

    def step(self, deaths: tuple[str, ...] = DEATHS) -> None:
        dies = deaths and self.random.random() < 0.06
        getattr(self, self.random.choice(deaths if dies else self.WORK))()

    def finish(self) -> None:
        idle = 0
        while not self.index.finished:
            progress = False
            for name in self.random.sample(self.WORK, len(self.WORK)):
                progress |= getattr(self, name)()
            idle = 0 if progress else idle + 1
            assert idle < 50, f"deadlock: {self.index.stats()}"
        assert self.updates == self.settings.num_updates
        assert sorted(self.uses) == list(range(self.settings.num_updates))


def students(lease: Lease) -> list[int]:
    return [ref.draw.number for ref in lease.groups if ref.draw.table == "student_text"]
