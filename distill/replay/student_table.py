"""Student draws: admitted under the rate limiter, used in draw order or re-used at random.

The index composes it with the teacher table. It uses neither clock nor files. Every change costs time in
proportion to the rows that it concerns, not to all that are live.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from distill.config import ReplayConfig
from distill.interfaces import Draw, GroupRef, SampleRef
from distill.replay.draws import BatchPlan, DrawOrder, Purpose, seeded_generator
from distill.replay.ledger import (
    DrawState,
    Item,
    LiveDraws,
    ReplayError,
    Shares,
    TrainedDraws,
    VersionHistory,
)
from distill.replay.limiter import RateLimiter
from distill.replay.payload_cache import SegmentUse


class StudentTable:
    """The live student draws by number.

    With ``max_times_sampled`` 1, and in lock-step, an update uses the next draws in order, because
    taking the groups that are ready first would favour short responses. Otherwise it samples without
    replacement from the groups that are young enough and not used up. A group that became too old
    before it was used is rolled out again instead of a new draw, so no draw is skipped.
    """

    def __init__(
        self,
        replay: ReplayConfig,
        plan: BatchPlan,
        limiter: RateLimiter,
        order: DrawOrder | None,
        segments: SegmentUse,
        shares: Shares,
        samples_per_prompt: int,
        trained: TrainedDraws,
        versions: VersionHistory,
    ) -> None:
        if order is None and plan.may_use_student:
            raise ReplayError("student_order", None, "be a DrawOrder: the recipe uses student text")
        self._replay = replay
        self._plan = plan
        self._limiter = limiter
        self._order = order
        self._segments = segments
        self._samples_per_prompt = samples_per_prompt
        self.in_order = replay.lock_step or replay.max_times_sampled == 1
        self.items = LiveDraws()
        self.trained = trained
        self.versions = versions
        self.num_inserted = 0
        self.num_expired = 0
        self._cursor = trained.prefix
        self._admitted = len(trained)
        self._to_roll_out: list[list[int]] = [[] for _ in range(shares.rollout)]
        """Per share: heap of admitted draws that no actor has."""
        self._to_score: list[list[tuple[int, int, int]]] = [[] for _ in range(shares.scoring)]
        """Per share: heap of (draw, sample, issue) without payload; some are no longer wanted."""
        self._expired: list[int] = []
        """Heap of draws whose group was not used in time; the limiter counts them as new."""
        self._rewound_below = 0
        """Draws below this number can have been in flight when the learner went back to a checkpoint."""
        self._scored_through = trained.prefix
        """All draws below this number are scored, or were used."""

    # Admission

    def admit(self, updates_done: int, next_update: int) -> None:
        """Admit draws as far as the limiter allows. They wait until a rollout actor takes them."""
        if not self.in_order:
            for item in self.items:
                self._expire(item, next_update)
        for _ in range(self._room(updates_done, next_update)):
            number = heapq.heappop(self._expired) if self._expired else self._next_number()
            self._admitted += 1
            if self.items.get(number) is None:
                assert self._order is not None
                self.items.add(
                    Item(
                        draw=self._order.draw(number),
                        state=DrawState.DRAWN,
                        num_samples=self._samples_per_prompt,
                    )
                )
            self._enqueue(number)

    def _room(self, updates_done: int, next_update: int) -> int:
        room = self._limiter.student_draws(updates_done) - self._admitted
        return max(0, room, self._shortfall(updates_done, next_update))

    def _shortfall(self, updates_done: int, next_update: int) -> int:
        """Return how many groups the next update would lack even if everything in flight arrived."""
        if self.in_order or updates_done != next_update or next_update >= self._limiter.num_updates:
            return 0
        supply = len(self._usable(next_update)) + self._num_pending()
        return max(0, self._plan.student_groups(next_update) - supply)

    def _num_pending(self) -> int:
        unscored = self.items.num(DrawState.DRAWN, DrawState.DISPATCHED, DrawState.GENERATED)
        return unscored - len(self._expired)

    def _next_number(self) -> int:
        while self._cursor in self.trained or self.items.get(self._cursor) is not None:
            self._cursor += 1
        self._cursor += 1
        return self._cursor - 1

    def _enqueue(self, number: int) -> None:
        heapq.heappush(self._to_roll_out[number % len(self._to_roll_out)], number)

    # Rollout

    @property
    def has_work(self) -> bool:
        """Whether an admitted draw waits for a rollout actor."""
        return any(self._to_roll_out)

    def take(self, share: int, room: int) -> list[Draw]:
        """Return draws to roll out. In lock-step they are the whole share, regardless of ``room``."""
        queue = self._to_roll_out[share]
        if self._replay.lock_step:
            room = len(queue)
        items = [self.items[heapq.heappop(queue)] for _ in range(min(room, len(queue)))]
        for item in items:
            self.items.move(item, DrawState.DISPATCHED)
        return [item.draw for item in items]

    def deliver(self, sample: SampleRef, next_update: int) -> bool:
        """Add a rolled-out sample; returns whether its group is complete.

        The caller knows that the draw is dispatched to the sender of the sample.

        Raises: ReplayError when the sample has no policy version.
        """
        if sample.oldest_version is None:
            raise ReplayError(f"oldest_version of sample {sample.work_id}", None, "be a policy version")
        item = self.items[sample.draw.number]
        item.stored[sample.sample] = sample
        item.delivered[sample.sample] = sample.location
        self._segments.add(sample)
        complete = len(item.stored) == item.num_samples
        if complete:
            self.items.move(item, DrawState.GENERATED)
            self.num_inserted += 1
        if not self._replay.lock_step:
            self._enqueue_sample(item, sample.sample)
        elif not self.items.num(DrawState.DRAWN, DrawState.DISPATCHED):
            # In lock-step a teacher actor scores its share of an update in one call, so it starts with the last.
            for each in self.items:
                for number in each.stored if each.state == DrawState.GENERATED else ():
                    self._enqueue_sample(each, number)
        self._settle(item, next_update)
        return complete

    def is_delivered(self, sample: SampleRef) -> bool:
        """Whether this very sample was delivered before, and its group is still there."""
        item = self.items.of(sample.draw)
        return item is not None and item.delivered.get(sample.sample) == sample.location

    def is_missing(self, sample: SampleRef) -> bool:
        """Whether the sample's group is being rolled out and lacks it."""
        item = self.items.of(sample.draw)
        return (
            item is not None and sample.sample in range(item.num_samples) and sample.sample not in item.stored
        )

    def give_back(self, draw: Draw) -> None:
        """Issue the draw of a dead rollout actor again, before later ones. Its samples so far are dropped."""
        item = self.items.of(draw)
        if item is not None and item.state == DrawState.DISPATCHED:
            self._draw_again(item)
            self._enqueue(draw.number)

    # Scoring

    @property
    def has_samples(self) -> bool:
        """Whether a sample may wait for a teacher actor."""
        return any(self._to_score)

    def take_samples(self, share: int, room: int) -> list[SampleRef]:
        """Return samples to score, in draw order. In lock-step they are the whole share, regardless of ``room``."""
        queue = self._to_score[share]
        if self._replay.lock_step:
            room = len(queue)
        taken: list[SampleRef] = []
        while queue and len(taken) < room:
            number, sample, issue = heapq.heappop(queue)
            item = self.items.get(number)
            if item is None or item.draw.issue != issue or sample in item.scored | item.in_scoring:
                continue
            item.in_scoring.add(sample)
            taken.append(item.stored[sample])
        return taken

    def deliver_scored(self, sample: SampleRef, next_update: int) -> None:
        """Add a sample with its payload. The caller knows that its sender holds it."""
        item = self.items[sample.draw.number]
        self._segments.replace(item.stored[sample.sample], sample)
        item.stored[sample.sample] = sample
        item.in_scoring.discard(sample.sample)
        item.scored.add(sample.sample)
        self._settle(item, next_update)

    def is_scored(self, sample: SampleRef) -> bool:
        """Whether this very payload was delivered before, and its group is still there."""
        item = self.items.of(sample.draw)
        if item is None or sample.sample not in item.scored:
            return False
        return item.stored[sample.sample].location == sample.location

    def is_in_scoring(self, sample: SampleRef) -> bool:
        """Whether the sample waits for the payload that some teacher actor computes."""
        item = self.items.of(sample.draw)
        return item is not None and sample.sample in item.in_scoring

    def give_back_sample(self, sample: SampleRef) -> None:
        """Let another teacher actor score the sample."""
        item = self.items.of(sample.draw)
        if item is not None and sample.sample in item.in_scoring:
            item.in_scoring.remove(sample.sample)
            self._enqueue_sample(item, sample.sample)

    def _enqueue_sample(self, item: Item, sample: int) -> None:
        number = item.draw.number
        heapq.heappush(self._to_score[number % len(self._to_score)], (number, sample, item.draw.issue))

    def _settle(self, item: Item, next_update: int) -> None:
        """Move a group on once its last sample is scored, or back if it came too late to be used."""
        if item.state == DrawState.GENERATED and len(item.scored) == item.num_samples:
            self.items.move(item, DrawState.SCORED)
        self._expire(item, next_update)

    # Sampling

    def select(self, update: int, updates_done: int) -> list[Item] | None:
        """Return the groups of ``update`` in draw order; None while some are missing."""
        count = self._plan.student_groups(update)
        if count == 0:
            return []
        if self.in_order:
            return self._next_in_order(update, updates_done)
        usable = self._usable(update)
        if len(usable) < max(count, self._min_size(len(usable), updates_done)):
            return None
        chosen = seeded_generator(self._plan.seed, Purpose.SAMPLER, update).choice(
            len(usable), size=count, replace=False
        )
        return [usable[place] for place in sorted(chosen)]

    def _next_in_order(self, update: int, updates_done: int) -> list[Item] | None:
        start, end = self._plan.student_through(update), self._plan.student_through(update + 1)
        self._scored_through = max(self._scored_through, start)
        while (item := self.items.get(self._scored_through)) and item.state >= DrawState.SCORED:
            self._scored_through += 1
        ready = self.items.num(DrawState.SCORED)
        if self._scored_through < end or ready < self._min_size(ready, updates_done):
            return None
        found = [self.items[number] for number in range(start, end)]
        stale = [item for item in found if self.age(item, update) > self._replay.max_policy_age]
        for item in stale:
            self._refuse_or_repeat(item, update)
        return None if stale else found

    def _min_size(self, ready: int, updates_done: int) -> int:
        """Return how many groups must be ready: at most those ready, in flight, or admissible now."""
        room = max(0, self._limiter.student_draws(updates_done) - self._admitted)
        return self._limiter.min_size(ready + self._num_pending() + room)

    def age(self, item: Item, update: int) -> int:
        """Return the updates between the weights that sampled the group's oldest token and ``update``."""
        return max(0, update - self.versions.made_at(item.oldest_version))

    def _usable(self, update: int) -> list[Item]:
        found = [
            item
            for item in self.items
            if item.state >= DrawState.SCORED
            and item.times_sampled < self._replay.max_times_sampled
            and self.age(item, update) <= self._replay.max_policy_age
        ]
        return sorted(found, key=lambda item: item.draw.number)

    # Removal

    def _expire(self, item: Item, update: int) -> None:
        """Queue an unused group that is too old for ``update`` and all later ones to be rolled out again."""
        idle = item.state in (DrawState.GENERATED, DrawState.SCORED) and not item.in_scoring
        if self.in_order or not idle or item.times_sampled:
            return
        if self.age(item, update) > self._replay.max_policy_age:
            self._draw_again(item)
            heapq.heappush(self._expired, item.draw.number)
            self.num_expired += 1

    def _refuse_or_repeat(self, item: Item, update: int) -> None:
        """Roll out a group again if the learner's return to a checkpoint made it too old; else raise.

        In draw order the limiter keeps every group young enough, with this exception: a learner that
        went back to a checkpoint pushes its older weights into rollouts that are in flight.

        Raises: ReplayError for any other group.
        """
        if item.draw.number >= self._rewound_below:
            raise ReplayError(
                "age",
                f"{self.age(item, update)} of draw {item.draw.draw_id} in update {update}",
                f"be <= replay.max_policy_age ({self._replay.max_policy_age}), which the rate limiter ensures; a rollout "
                "actor sampled with weights older than the newest announced",
                "check the weight push",
            )
        self._draw_again(item)
        self._enqueue(item.draw.number)
        self.num_expired += 1

    def _draw_again(self, item: Item) -> None:
        for sample in item.stored.values():
            self._segments.remove(sample)
        self.items.issue_again(item)
        self._scored_through = min(self._scored_through, item.draw.number)

    def restore(self, group: GroupRef, update: int) -> None:
        """Add a group that an earlier index leased to ``update``."""
        item = self.items.get(group.draw.number)
        if item is None:
            samples = {sample.sample: sample for sample in group.samples}
            item = Item(
                draw=group.draw,
                state=DrawState.SCORED,
                num_samples=len(samples),
                stored=samples,
                scored=set(samples),
            )
            self.items.add(item)
            self._admitted += group.draw.number not in self.trained  # those are counted
            for sample in group.samples:
                self._segments.add(sample)
        self.items.lease(item, update)
        if group.draw.number in self.trained:  # by how many durable updates is not known any more
            item.times_sampled = self._replay.max_times_sampled

    def rewind(self) -> None:
        """Record that the learner went back: groups in flight can be older than planned."""
        self._rewound_below = max([self._cursor, self._rewound_below])

    def commit(self, numbers: Iterable[int], updates_done: int, next_update: int) -> None:
        """Mark the draws of durable updates as trained for good, and remove groups that are used up."""
        for number in numbers:
            self.trained.add(number)
        for item in self.items:
            final = item.times_sampled > 0 and item.last_update < updates_done
            if final and (self.in_order or self._used_up(item, next_update)):
                for sample in item.stored.values():
                    self._segments.remove(sample)
                self.items.remove(item)

    def _used_up(self, item: Item, next_update: int) -> bool:
        too_old = self.age(item, next_update) > self._replay.max_policy_age
        return too_old or item.times_sampled >= self._replay.max_times_sampled
