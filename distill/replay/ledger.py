"""The records of the replay index: draw states, live draws, trained draws and the age of versions.

Used by the two tables and the index.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from distill.errors import DistillError
from distill.interfaces import Draw, GroupRef, Location, SampleRef


class ReplayError(DistillError, RuntimeError):
    """A call that contradicts the ledger, or a setting under which the index cannot work."""

    code = "replay"


class DrawState(IntEnum):
    """The progress of a draw, in ascending order."""

    DRAWN = 0
    """In the data order, and with no actor."""
    DISPATCHED = 1
    """With a rollout actor (student draws) or a teacher actor (teacher draws)."""
    GENERATED = 2
    """All samples are rolled out and stored, not all scored. Student draws only."""
    SCORED = 3
    """Ready for the learner."""
    LEASED = 4
    """With the learner."""
    TRAINED = 5
    """Its update was applied; provisional until the checkpoint that contains it is durable."""


@dataclass(kw_only=True)
class Item:
    """A live draw and its progress. Its state is that of its least advanced row."""

    draw: Draw
    state: DrawState
    num_samples: int = 1
    stored: dict[int, SampleRef] = field(default_factory=dict)
    """Rows by sample number, where they are now: those that wait for their payload, then with it."""
    delivered: dict[int, Location] = field(default_factory=dict)
    """Where the rollout actor wrote each sample, so that a delivery which is sent again is recognised."""
    scored: set[int] = field(default_factory=set)
    """Samples with their payload."""
    in_scoring: set[int] = field(default_factory=set)
    """Samples that a teacher actor holds."""
    times_sampled: int = 0
    last_update: int = -1
    """The newest update that leased it. A teacher draw has only one, known from its admission on."""

    @property
    def group(self) -> GroupRef:
        """The whole group; its rows are in the order of their numbers."""
        return GroupRef(draw=self.draw, samples=tuple(self.stored[i] for i in range(self.num_samples)))

    @property
    def oldest_version(self) -> int:
        """The oldest policy version that sampled one of its tokens."""
        versions = [ref.oldest_version for ref in self.stored.values() if ref.oldest_version is not None]
        return min(versions)


class LiveDraws:
    """The live draws of one table by number, with how many are in each state."""

    def __init__(self) -> None:
        self._items: dict[int, Item] = {}
        self._num: Counter[DrawState] = Counter()

    def __iter__(self) -> Iterator[Item]:
        """The items as they are now, so that a loop may remove some."""
        return iter(list(self._items.values()))

    def __getitem__(self, number: int) -> Item:
        return self._items[number]

    def get(self, number: int) -> Item | None:
        return self._items.get(number)

    def of(self, draw: Draw) -> Item | None:
        """Return the item of this very issue of a draw; None for an earlier issue, and once it is trained."""
        item = self._items.get(draw.number)
        return item if item is not None and item.draw == draw else None

    def add(self, item: Item) -> None:
        self._items[item.draw.number] = item
        self._num[item.state] += 1

    def remove(self, item: Item) -> None:
        self._num[item.state] -= 1
        del self._items[item.draw.number]

    def move(self, item: Item, state: DrawState) -> None:
        """Change the state of an item."""
        self._num[item.state] -= 1
        self._num[state] += 1
        item.state = state

    def lease(self, item: Item, update: int) -> None:
        """Record that ``update`` uses the item."""
        self.move(item, DrawState.LEASED)
        item.times_sampled += 1
        item.last_update = update

    def issue_again(self, item: Item) -> None:
        """Return an item to the first state. What arrives of the earlier issue is refused from now on."""
        self.move(item, DrawState.DRAWN)
        item.draw = replace(item.draw, issue=item.draw.issue + 1)
        for progress in (item.stored, item.delivered, item.scored, item.in_scoring):
            progress.clear()

    def mark_applied(self, updates: int) -> None:
        """Tell leased items from trained ones, when the first ``updates`` updates are applied."""
        for item in self:
            if item.state >= DrawState.LEASED:
                self.move(item, DrawState.TRAINED if item.last_update < updates else DrawState.LEASED)

    def num(self, *states: DrawState) -> int:
        """Return how many items are in one of the states."""
        return sum(self._num[state] for state in states)


@dataclass(frozen=True)
class Shares:
    """Into how many parts the work of a pool is divided, by draw number modulo that number.

    In lock-step there is a part for each actor, so that which actor does what, and together with which other
    work, does not depend on timing. Otherwise there is one part, from which every actor with room takes.
    """

    rollout: int = 1
    scoring: int = 1


class TrainedDraws:
    """A set of draw numbers that is nearly 0..n-1, stored as n and the few numbers beyond it."""

    def __init__(self, prefix: int = 0, extra: Iterable[int] = ()) -> None:
        self.prefix = prefix
        self.extra = set(extra)

    def __contains__(self, number: int) -> bool:
        return number < self.prefix or number in self.extra

    def __len__(self) -> int:
        return self.prefix + len(self.extra)

    def add(self, number: int) -> None:
        if number in self:
            return
        self.extra.add(number)
        while self.prefix in self.extra:
            self.extra.remove(self.prefix)
            self.prefix += 1

    def with_numbers(self, numbers: Iterable[int]) -> TrainedDraws:
        """Return a copy with these numbers added."""
        copy = TrainedDraws(self.prefix, self.extra)
        for number in numbers:
            copy.add(number)
        return copy

    def to_json(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "extra": sorted(self.extra)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> TrainedDraws:
        return TrainedDraws(int(value["prefix"]), (int(number) for number in value["extra"]))


class VersionHistory:
    """The number of updates in each policy version.

    An unknown version (its push failed, or is live in one engine but not yet in all) counts as
    the newest known version below it, so that its age is never underestimated.
    """

    def __init__(self, known: Iterable[tuple[int, int]] = ((0, 0),)) -> None:
        self._versions: list[int] = []
        self._updates: list[int] = []
        for version, updates in known:
            self.record(version, updates)

    @property
    def newest(self) -> int:
        return self._versions[-1]

    def record(self, version: int, updates_done: int) -> None:
        """Record that ``version`` consists of the weights after ``updates_done`` updates.

        Raises: ReplayError when ``version`` is not above the newest one, unless it repeats the newest exactly.
        """
        if self._versions and version <= self.newest:
            if (version, updates_done) == (self.newest, self._updates[-1]):
                return
            raise ReplayError(
                "policy_version",
                version,
                f"be above the newest one ({self.newest}), because a version never names two sets of weights",
                "persist the counter before each push",
            )
        self._versions.append(version)
        self._updates.append(updates_done)

    def made_at(self, version: int) -> int:
        """Return the number of updates done when ``version`` was made."""
        place = bisect_right(self._versions, version)
        return self._updates[place - 1] if place else 0

    def forget_before(self, updates: int) -> None:
        """Drop the versions up to ``updates``, except the newest, as which unknown later versions count."""
        while len(self._updates) > 1 and self._updates[1] <= updates:
            del self._updates[0], self._versions[0]

    def to_json(self) -> list[list[int]]:
        return [list(pair) for pair in zip(self._versions, self._updates, strict=True)]
