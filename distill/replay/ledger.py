"""The records of the replay index: draw states, live draws, trained draws and the age of versions.

Used by the two tables and the index.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from distill.errors import DistillError
from distill.interfaces import Draw, GroupRef

Stage = Literal["rollout", "scoring"]
"""The work of the actor that gives a draw back."""


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
    """Rolled out and stored, not scored. Student draws only."""
    SCORED = 3
    """Ready for the learner."""
    LEASED = 4
    """With the learner."""
    TRAINED = 5
    """Its update was applied; provisional until the checkpoint that contains it is durable."""


@dataclass(kw_only=True)
class Item:
    """A live draw and its progress."""

    draw: Draw
    state: DrawState
    ref: GroupRef | None = None
    in_scoring: bool = False
    """Whether a teacher actor is scoring the group of a student draw."""
    times_sampled: int = 0
    last_update: int = -1
    """The newest update that leased it. A teacher draw has only one, known from its admission on."""

    @property
    def stored(self) -> GroupRef:
        assert self.ref is not None
        return self.ref

    def lease(self, update: int) -> None:
        self.state = DrawState.LEASED
        self.times_sampled += 1
        self.last_update = update


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
