"""Student draws: admitted under the rate limiter, used in draw order or re-used at random.

The index composes it with the teacher table. It uses neither clock nor files.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from distill.config import ReplayConfig
from distill.errors import NO_VALUE
from distill.interfaces import Draw, GroupRef
from distill.replay.draws import BatchPlan, DrawOrder, Purpose, seeded_generator
from distill.replay.ledger import DrawState, Item, ReplayError, Stage, TrainedDraws, VersionHistory
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
        self.in_order = replay.lock_step or replay.max_times_sampled == 1
        self.items: dict[int, Item] = {}
        self.trained = trained
        self.versions = versions
        self.num_inserted = 0
        self.num_expired = 0
        self._cursor = trained.prefix
        self._admitted = len(trained)
        self._again: list[int] = []
        """Heap of draws given back by a dead actor; the limiter does not count them again."""
        self._expired: list[int] = []
        """Heap of draws whose group was not used in time; the limiter counts them as new."""
        self._rewound_below = 0
        """Draws below this number can have been in flight when the learner went back to a checkpoint."""

    # Admission

    def admit(self, max_draws: int, updates_done: int, next_update: int) -> list[Draw]:
        """Admit draws that were given back, then new ones, as far as the limiter allows."""
        self._expire(next_update)
        room = self._room(updates_done, next_update)
        if self._replay.lock_step:
            max_draws = len(self._again) + room
        numbers = [heapq.heappop(self._again) for _ in range(min(max_draws, len(self._again)))]
        for _ in range(min(room, max_draws - len(numbers))):
            numbers.append(heapq.heappop(self._expired) if self._expired else self._next_number())
            self._admitted += 1
        return [self._dispatch(number) for number in numbers]

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
        unscored = sum(item.state < DrawState.SCORED for item in self.items.values())
        return unscored - len(self._expired)

    def _next_number(self) -> int:
        while self._cursor in self.trained:
            self._cursor += 1
        self._cursor += 1
        return self._cursor - 1

    def _dispatch(self, number: int) -> Draw:
        if number not in self.items:
            assert self._order is not None
            self.items[number] = Item(draw=self._order.draw(number), state=DrawState.DRAWN)
        self.items[number].state = DrawState.DISPATCHED
        return self.items[number].draw

    # Rollout and scoring

    def insert(self, groups: Sequence[GroupRef]) -> None:
        """Add rolled-out groups, all or none."""
        for item, group in self._expected(groups, DrawState.DISPATCHED):
            item.state, item.ref = DrawState.GENERATED, group
            self._segments.add(group)
            self.num_inserted += 1

    def insert_scored(self, groups: Sequence[GroupRef]) -> None:
        """Add groups with their payload, all or none."""
        for item, group in self._expected(groups, DrawState.GENERATED):
            self._segments.replace(item.stored, group)
            item.state, item.ref, item.in_scoring = DrawState.SCORED, group, False

    def _expected(self, groups: Sequence[GroupRef], state: DrawState) -> list[tuple[Item, GroupRef]]:
        pairs = [(self.items.get(group.draw.number), group) for group in groups]
        if len({group.draw.number for group in groups}) < len(groups):
            raise ReplayError("groups", [group.draw.draw_id for group in groups], "be of different draws")
        for item, group in pairs:
            found = (
                "unknown or trained" if item is None or item.draw != group.draw else item.state.name.lower()
            )
            if item is None or item.draw != group.draw or item.state != state:
                raise ReplayError(
                    f"draw {group.draw.draw_id}",
                    found,
                    f"be {state.name.lower()}; its group arrived twice, or late from an actor that lost the draw",
                    "drop the group",
                )
            if state == DrawState.GENERATED and not item.in_scoring:
                raise ReplayError(
                    f"draw {group.draw.draw_id}",
                    NO_VALUE,
                    "be with a teacher actor; its job was given back",
                    "drop the group",
                )
            if group.oldest_version is None:
                raise ReplayError(f"oldest_version of draw {group.draw.draw_id}", None, "be a policy version")
        return [(item, group) for item, group in pairs if item is not None]

    def take_for_scoring(self, max_groups: int) -> list[GroupRef]:
        """Return rolled-out groups in draw order; in lock-step only when the whole batch is rolled out."""
        waiting = sorted(
            number
            for number, item in self.items.items()
            if item.state == DrawState.GENERATED and not item.in_scoring
        )
        if self._replay.lock_step:
            whole = all(item.state >= DrawState.GENERATED for item in self.items.values())
            max_groups = len(waiting) if whole else 0
        items = [self.items[number] for number in waiting[:max_groups]]
        for item in items:
            item.in_scoring = True
        return [item.stored for item in items]

    def requeue(self, draw_id: str, number: int, stage: Stage | None) -> bool:
        """Give back the draw of a dead actor. Returns False when the draw was past that stage."""
        item = self.items.get(number)
        if item is None or item.draw.draw_id != draw_id:
            return False
        if item.state == DrawState.DISPATCHED and stage != "scoring":
            self._draw_again(item, self._again)
            return True
        if item.in_scoring and stage != "rollout":
            item.in_scoring = False
            return True
        return False

    # Sampling

    def select(self, update: int, updates_done: int) -> list[Item] | None:
        """Return the groups of ``update`` in draw order; None while some are missing."""
        count = self._plan.student_groups(update)
        if count == 0:
            return []
        if self.in_order:
            return self._next_in_order(update, updates_done)
        self._expire(update)
        usable = self._usable(update)
        if len(usable) < max(count, self._min_size(len(usable), updates_done)):
            return None
        chosen = seeded_generator(self._plan.seed, Purpose.SAMPLER, update).choice(
            len(usable), size=count, replace=False
        )
        return [usable[place] for place in sorted(chosen)]

    def _next_in_order(self, update: int, updates_done: int) -> list[Item] | None:
        numbers = range(self._plan.student_through(update), self._plan.student_through(update + 1))
        items = [self.items.get(number) for number in numbers]
        found = [item for item in items if item is not None and item.state == DrawState.SCORED]
        ready = sum(item.state == DrawState.SCORED for item in self.items.values())
        if len(found) < len(numbers) or ready < self._min_size(ready, updates_done):
            return None
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
        version = item.stored.oldest_version
        assert version is not None
        return max(0, update - self.versions.made_at(version))

    def _usable(self, update: int) -> list[Item]:
        return [
            item
            for _, item in sorted(self.items.items())
            if item.state >= DrawState.SCORED
            and item.times_sampled < self._replay.max_times_sampled
            and self.age(item, update) <= self._replay.max_policy_age
        ]

    # Removal

    def _expire(self, update: int) -> None:
        """Queue unused groups that are too old for ``update`` and all later ones to be rolled out again."""
        if self.in_order:
            return
        for item in list(self.items.values()):
            idle = item.state in (DrawState.GENERATED, DrawState.SCORED) and not item.in_scoring
            if idle and item.times_sampled == 0 and self.age(item, update) > self._replay.max_policy_age:
                self._draw_again(item, self._expired)
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
        self._draw_again(item, self._again)
        self.num_expired += 1

    def _draw_again(self, item: Item, queue: list[int]) -> None:
        if item.ref is not None:
            self._segments.remove(item.ref)
        item.state, item.ref = DrawState.DRAWN, None
        heapq.heappush(queue, item.draw.number)

    def rewind(self) -> None:
        """Record that the learner went back: groups in flight can be older than planned."""
        self._rewound_below = max([self._cursor, self._rewound_below])

    def commit(self, numbers: Iterable[int], updates_done: int, next_update: int) -> None:
        """Mark the draws of durable updates as trained for good, and remove groups that are used up."""
        for number in numbers:
            self.trained.add(number)
        for number, item in list(self.items.items()):
            final = item.times_sampled > 0 and item.last_update < updates_done
            if final and (self.in_order or self._used_up(item, next_update)):
                self._segments.remove(item.stored)
                del self.items[number]

    def _used_up(self, item: Item, next_update: int) -> bool:
        too_old = self.age(item, next_update) > self._replay.max_policy_age
        return too_old or item.times_sampled >= self._replay.max_times_sampled
