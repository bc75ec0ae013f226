"""Teacher draws: the corpus rows of each update, scored once and cached while there is room.

The index composes it with the student table. Teacher text does not age, so its draws are admitted
update by update, and the lease of an update contains exactly its draws.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from distill.interfaces import Draw, GroupRef
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.ledger import DrawState, Item, ReplayError, Stage
from distill.replay.payload_cache import PayloadCache


class TeacherTable:
    """The live teacher draws by number, and the draws that wait for each corpus row."""

    def __init__(
        self,
        plan: BatchPlan,
        order: DrawOrder | None,
        cache: PayloadCache,
        one_update_per_job: bool,
        first_update: int,
    ) -> None:
        self._plan = plan
        self._order = order
        self._cache = cache
        self._one_update_per_job = one_update_per_job
        self.items: dict[int, Item] = {}
        self._unscored: defaultdict[int, list[Item]] = defaultdict(list)
        """Corpus index -> draws without payload."""
        self.updates_admitted = first_update
        """The draws of updates below this number are trained or live."""

    def admit_through(self, updates: int) -> None:
        """Admit the draws of the first ``updates`` updates; those of cached rows are scored at once."""
        while self.updates_admitted < updates:
            update = self.updates_admitted
            for number in range(self._plan.teacher_through(update), self._plan.teacher_through(update + 1)):
                self._admit(number, update)
            self.updates_admitted += 1

    def _admit(self, number: int, update: int) -> None:
        if self._order is None:
            raise ReplayError("teacher_order", None, "be a DrawOrder: the recipe uses teacher text")
        item = Item(draw=self._order.draw(number), state=DrawState.DRAWN, last_update=update)
        self.items[number] = item
        row = self._cache.pin(item.draw.index)
        if row is None:
            self._unscored[item.draw.index].append(item)
        else:
            item.state, item.ref = DrawState.SCORED, replace(row, draw=item.draw)

    def take_for_scoring(self, max_draws: int) -> list[Draw]:
        """Return draws whose row is neither scored nor being scored; in lock-step all of one update."""
        items: list[Item] = []
        for waiting in self._unscored.values():
            if all(item.state == DrawState.DRAWN for item in waiting):
                items.append(min(waiting, key=lambda item: item.draw.number))
        items.sort(key=lambda item: item.draw.number)
        if self._one_update_per_job:
            items = [item for item in items if item.last_update == items[0].last_update]
        else:
            items = items[:max_draws]
        for item in items:
            item.state = DrawState.DISPATCHED
        return [item.draw for item in items]

    def insert_scored(self, groups: Sequence[GroupRef]) -> None:
        """Add scored rows to the cache and to every draw that waits for them."""
        self.check_expected(groups)
        for group in groups:
            self._cache.put(group.draw.index, group)
            for item in self._unscored.pop(group.draw.index, ()):
                item.state, item.ref = DrawState.SCORED, replace(group, draw=item.draw)

    def check_expected(self, groups: Sequence[GroupRef]) -> None:
        """Check that a teacher actor was scoring all of these rows.

        Raises: ReplayError when one of them was not dispatched, or arrives twice.
        """
        if len({group.draw.number for group in groups}) < len(groups):
            raise ReplayError("groups", [group.draw.draw_id for group in groups], "be of different draws")
        for group in groups:
            item = self.items.get(group.draw.number)
            if item is None or item.draw != group.draw or item.state != DrawState.DISPATCHED:
                found = "unknown or trained" if item is None else item.state.name.lower()
                raise ReplayError(
                    f"draw {group.draw.draw_id}",
                    found,
                    "be dispatched; its row arrived twice, or late from a teacher that lost the draw",
                    "drop the row",
                )

    def requeue(self, draw_id: str, number: int, stage: Stage | None) -> bool:
        """Give back the draw of a dead teacher actor. Returns False when it did not have the draw."""
        item = self.items.get(number)
        if item is None or item.draw.draw_id != draw_id or stage == "rollout":
            return False
        if item.state != DrawState.DISPATCHED:
            return False
        item.state = DrawState.DRAWN
        return True

    def select(self, update: int) -> list[Item] | None:
        """Return the rows of ``update`` in draw order; None while some are missing."""
        numbers = range(self._plan.teacher_through(update), self._plan.teacher_through(update + 1))
        items = [self.items.get(number) for number in numbers]
        scored = [item for item in items if item is not None and item.state >= DrawState.SCORED]
        return scored if len(scored) == len(numbers) else None

    def commit(self, updates_done: int) -> None:
        """Remove the draws of durable updates; their rows stay in the cache, unpinned."""
        for number, item in list(self.items.items()):
            if item.last_update < updates_done:
                self._cache.unpin(item.draw.index)
                del self.items[number]
