"""A run around a replay index without engines: actors, a learner and their deaths, in any order.

It keeps records of its own (plain lists and dictionaries that never come from the index) and checks
every result of the index against them.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict

from distill.interfaces import Draw, Holder, Lease, SampleRef, Work
from distill.replay.past import IndexPast
from tests.unit.replay.builders import Settings, draw_numbers, sample

ROWS_PER_SEGMENT = 3


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
        self.announced_versions: list[tuple[int, int]] = []
        self.dead: list[Holder] = []
        self.lineage = 0
        self.shares: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.jobs: list[tuple[int, tuple[tuple[str, int, int], ...]]] = []
        self.start_actors()
        self.push()

    def start_actors(self) -> None:
        """Every actor and its work; those of an earlier index are gone."""
        incarnation = max((holder.incarnation for holder in getattr(self, "work", {})), default=-1) + 1
        settings = self.settings
        self.work: dict[Holder, list[tuple[Work, int]]] = {  # with the version when it was given
            holder: []
            for holder in [
                *(Holder("rollout", number, incarnation) for number in range(settings.num_rollouts)),
                *(Holder("teacher", number, incarnation) for number in range(settings.num_scorers)),
            ]
        }
        self.left: dict[str, set[int]] = {}
        """Samples to deliver of draws of which some are delivered."""
        self.void: set[str] = set()
        """Draws whose rollout actor died. Teacher actors can have samples of them, which are refused."""
        self.admitted: set[int] = set()
        self.last_delivery: dict[Holder, list[SampleRef]] = defaultdict(list)
        self.lease: Lease | None = None
        self.leased: dict[int, Lease] = {}
        self.most_live_updates = 0  # a learner that went back does not revoke admissions
        self.appended: Counter[str] = Counter()
        self.announced: Counter[str] = Counter()
        self.deleted: set[str] = set()

    def actors(self, role: str) -> list[Holder]:
        return [holder for holder in self.work if holder.role == role]

    # Actions

    def take_draws(self) -> bool:
        holder = self.random.choice(self.actors("rollout"))
        if self.settings.max_policy_age == 0 and self.work[holder]:
            return False
        draws = self.index.take(holder, self.random.randint(1, 5))
        numbers = [draw.number for draw in draws]
        trained = {n for use in self.uses.values() if use.update < self.updates for n in students(use)}
        busy = {work.number for other in self.actors("rollout") for work, _ in self.work[other]}
        assert not busy.intersection(numbers), "two actors have one draw"
        assert not (trained & set(numbers)), "a trained draw is issued again"
        self.admitted.update(numbers)
        if self.in_order:
            assert len(self.admitted | trained) <= self.bound()
        self.work[holder] += [(draw, self.live_version) for draw in draws]
        if draws:
            self.shares[holder.number, self.updates] += numbers
        return bool(draws)

    def bound(self) -> int:
        settings = self.settings
        horizon = min(self.most_live_updates + settings.max_policy_age + 1, settings.num_updates)
        needed = settings.plan.student_through(horizon)
        by_updates = math.ceil(needed / settings.samples_per_insert)
        return max(by_updates, min(settings.min_size_to_sample, needed))

    def roll_out(self) -> bool:
        """Deliver some of the samples of a draw that are not delivered yet."""
        holder = self.random.choice(self.actors("rollout"))
        if not self.work[holder]:
            return False
        self.random.shuffle(self.work[holder])
        draw, since = self.work[holder][0]
        left = self.left.setdefault(draw.work_id, set(range(self.settings.samples_per_prompt)))
        for number in self.random.sample(sorted(left), self.random.randint(1, len(left))):
            version = self.random.choice([since, self.live_version])
            self.deliver(holder, [self.store(draw, number, holder, version)])
            left.remove(number)
        if not left:
            del self.left[draw.work_id], self.work[holder][0]
        return True

    def deliver(self, holder: Holder, samples: list[SampleRef]) -> None:
        void = [each.work_id for each in samples if each.draw.work_id in self.void]
        assert self.index.deliver(holder, samples) == void
        self.announced.update(each.location.segment for each in samples)
        self.last_delivery[holder] = samples

    def store(self, draw: Draw, number: int, holder: Holder, version: int | None) -> SampleRef:
        count = sum(n for name, n in self.appended.items() if name.startswith(f"{holder}-"))
        segment = f"{holder}-{count // ROWS_PER_SEGMENT}.arrow"
        self.appended[segment] += 1
        return sample(draw, version, segment, self.random.randint(1, 50), number, count)

    def take_samples(self) -> bool:
        holder = self.random.choice(self.actors("teacher"))
        if self.settings.max_policy_age == 0 and self.work[holder]:
            return False
        job = self.index.take(holder, self.random.randint(1, 6))
        stored = [work.location.segment for work in job if isinstance(work, SampleRef)]
        assert not self.deleted.intersection(stored)
        self.work[holder] += [(work, self.live_version) for work in job]
        if job:
            names = tuple(
                (work.draw.table, work.draw.number, work.sample)
                if isinstance(work, SampleRef)
                else (work.table, work.number, 0)
                for work in job
            )
            self.jobs.append((holder.number, names))
        return bool(job)

    def score(self) -> bool:
        holder = self.random.choice(self.actors("teacher"))
        if not self.work[holder]:
            return False
        count = self.random.randint(1, len(self.work[holder]))
        done, self.work[holder] = self.work[holder][:count], self.work[holder][count:]
        for work, _ in done:
            if isinstance(work, SampleRef):
                self.deliver(holder, [self.store(work.draw, work.sample, holder, work.oldest_version)])
            else:
                self.deliver(holder, [self.store(work, 0, holder, None)])
        return True

    def repeat(self) -> bool:
        """Send the last delivery again, or something that another actor has."""
        holder = self.random.choice(list(self.work))
        before = self.index.stats() | {"replay/num_refused": 0}
        self.index.deliver(holder, self.last_delivery[holder])
        others = [each for each in self.actors(holder.role) if each != holder]
        other = self.random.choice(others or [holder])
        stolen = [work for work, _ in self.work[other]]
        if other != holder and stolen:
            work = self.random.choice(stolen)
            draw, number = (work.draw, work.sample) if isinstance(work, SampleRef) else (work, 0)
            refused = self.store(draw, number, holder, self.live_version)
            assert self.index.deliver(holder, [refused]) == [refused.work_id]
            self.announced[refused.location.segment] += 1
        assert self.index.stats() | {"replay/num_refused": 0} == before
        return False

    def lose_answer(self) -> bool:
        """An actor whose answer was lost gets the same work again."""
        holder = self.random.choice(list(self.work))
        known = self.random.sample(self.work[holder], self.random.randint(0, len(self.work[holder])))
        missing = self.index.holdings.missing(holder, [work.work_id for work, _ in known])
        held = {work.work_id for work, _ in self.work[holder]} - {work.work_id for work, _ in known}
        assert {work.work_id for work in missing} == held
        return False

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
        teacher_rows = draw_numbers(lease.groups, "teacher_text")
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
            oldest = min(each.oldest_version for each in ref.samples)
            assert update - self.true_updates[oldest] <= age <= settings.max_policy_age
        rows = [each for group in lease.groups for each in group.samples]
        assert not self.deleted.intersection(each.location.segment for each in rows)
        assert all(each.location.segment.startswith("teacher") for each in rows), "a row has no payload"
        assert all(len(group.samples) == settings.samples_per_prompt for group in lease.groups[: len(used)])
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
            self.roll_out()
        self.index.advance(self.updates, version)
        self.announced_versions.append((version, self.updates))
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
        """Delete what the index does not need, of full segments whose rows are all announced."""
        settled = [
            name for name, count in self.appended.items() if count == self.announced[name] == ROWS_PER_SEGMENT
        ]
        self.deleted |= set(settled) - set(self.index.live_segments(settled))
        return False

    # Deaths

    def kill_actor(self) -> bool:
        """An actor is forgotten; its heir has the same number. What the dead one still sends is refused."""
        holder = self.random.choice(list(self.work))
        lost = [work for work, _ in self.work.pop(holder)]
        self.void |= {work.work_id for work in lost if isinstance(work, Draw)}
        assert self.index.forget(holder) == len(lost)
        self.dead.append(holder)
        for work in lost:
            draw, number = (work.draw, work.sample) if isinstance(work, SampleRef) else (work, 0)
            late = self.store(draw, number, holder, self.live_version)
            assert self.index.deliver(holder, [late]) == [late.work_id]
        self.work[Holder(holder.role, holder.number, holder.incarnation + 1)] = []
        return False

    def restart_learner(self) -> bool:
        """Restart the learner from its durable checkpoint; actors and index continue."""
        self.back_to_checkpoint()
        if self.index.go_back(self.durable[1] if self.durable[0] else None):
            self.lineage += 1
            self.void_all_work()
            self.leased = {}
            self.most_live_updates = 0
        self.lease = None
        self.push()
        return False

    def restart_index(self) -> bool:
        """The index dies; another takes over. The actors still have work of the old one, which is refused."""
        leases = {update: lease for update, lease in self.leased.items() if update >= self.committed}
        self.lineage += 1
        self.index = self.settings.index()
        self.index.take_over(
            IndexPast(
                state=self.durable[1] if self.durable[0] else None,
                leases=tuple(leases[update] for update in sorted(leases)),
                updates_acknowledged=self.updates,
                versions=tuple(self.announced_versions),
                dead=tuple(self.dead),
                lineage=self.lineage,
            )
        )
        self.void_all_work()
        return False

    def void_all_work(self) -> None:
        """All that the actors hold was forgotten: what they deliver of it is refused."""
        for holder, work in self.work.items():
            for each, _ in work:
                draw, number = (each.draw, each.sample) if isinstance(each, SampleRef) else (each, 0)
                late = self.store(draw, number, holder, self.live_version)
                assert self.index.deliver(holder, [late]) == [late.work_id]
                self.announced[late.location.segment] += 1
            work.clear()
        self.left.clear()
        self.last_delivery.clear()
        trained = {n for use in self.uses.values() for n in students(use)}
        self.admitted &= {n for lease in self.leased.values() for n in students(lease)} | trained

    def crash(self) -> bool:
        """Kill everything; only the durable checkpoint survives."""
        self.back_to_checkpoint()
        self.start_actors()
        self.lineage = 0
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
        "take_draws",
        "roll_out",
        "take_samples",
        "score",
        "take_lease",
        "apply",
        "publish",
        "checkpoint",
        "commit",
        "collect",
        "repeat",
        "lose_answer",
    )
    DEATHS = ("kill_actor", "restart_learner", "restart_index", "crash")

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
    return draw_numbers(lease.groups)
