"""Teacher draws: the corpus rows of each update, scored once and cached while there is room.

The index composes it with the student table. Teacher text does not age, so its draws are admitted
update by update, and the lease of an update contains exactly its draws.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import replace

from distill.interfaces import Draw, SampleRef
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.ledger import DrawState, Item, LiveDraws, ReplayError
from distill.replay.payload_cache import PayloadCache


class TeacherTable:
    """The live teacher draws by number, and the draws that wait for each corpus row."""

    def __init__(
        self,
        plan: BatchPlan,
        order: DrawOrder | None,
        cache: PayloadCache,
        num_shares: int,
        one_update_per_job: bool,
        first_update: int,
    ) -> None:
        self._plan = plan
        self._order = order
        self._cache = cache
        self._one_update_per_job = one_update_per_job
        self.items = LiveDraws()
        self._unscored: defaultdict[int, list[Item]] = defaultdict(list)
        """Corpus index -> draws without payload."""
        self._queues: list[list[int]] = [[] for _ in range(num_shares)]
        """Per share: heap of the draws whose rows no teacher actor has. One draw stands for all of its row."""
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
        self.items.add(item)
        row = self._cache.pin(item.draw.index)
        if row is not None:
            self._score(item, row)
            return
        waiting = self._unscored[item.draw.index]
        waiting.append(item)
        if len(waiting) == 1:
            self._enqueue(item)

    def _enqueue(self, item: Item) -> None:
        heapq.heappush(self._queues[item.draw.number % len(self._queues)], item.draw.number)

    @property
    def has_work(self) -> bool:
        """Whether some row waits for a teacher actor."""
        return any(self._queues)

    def take(self, share: int, room: int) -> list[Draw]:
        """Return draws whose rows no teacher actor has; in lock-step all of one update, regardless of ``room``."""
        queue = self._queues[share]
        taken: list[Item] = []
        while queue and (self._one_update_per_job or len(taken) < room):
            item = self.items[queue[0]]
            if self._one_update_per_job and taken and item.last_update != taken[0].last_update:
                break
            heapq.heappop(queue)
            self.items.move(item, DrawState.DISPATCHED)
            taken.append(item)
        return [item.draw for item in taken]

    def deliver(self, row: SampleRef) -> None:
        """Add a scored row to the cache and to every draw that waits for it. The caller knows who held it."""
        index = row.draw.index
        self._cache.put(index, row)
        for item in self._unscored.pop(index, ()):
            self._score(item, row)

    def is_dispatched(self, draw: Draw) -> bool:
        """Whether some teacher actor scores the row."""
        item = self.items.of(draw)
        return item is not None and item.state == DrawState.DISPATCHED

    def is_repeated(self, row: SampleRef) -> bool:
        """Whether this very row was delivered before and is still in the cache."""
        cached = self._cache.row(row.draw.index)
        return cached is not None and cached.location == row.location

    def give_back(self, draw: Draw) -> None:
        """Let another teacher actor score the row."""
        item = self.items.of(draw)
        if item is not None and item.state == DrawState.DISPATCHED:
            self.items.issue_again(item)
            self._enqueue(item)

    def select(self, update: int) -> list[Item] | None:
        """Return the rows of ``update`` in draw order; None while some are missing."""
        numbers = range(self._plan.teacher_through(update), self._plan.teacher_through(update + 1))
        items: list[Item] = []
        for number in numbers:
            item = self.items.get(number)
            if item is None or item.state < DrawState.SCORED:
                return None
            items.append(item)
        return items

    def commit(self, updates_done: int) -> None:
        """Remove the draws of durable updates; their rows stay in the cache, unpinned."""
        for item in self.items:
            if item.last_update >= updates_done:
                break  # they are in the order of their updates
            self._cache.unpin(item.draw.index)
            self.items.remove(item)

    def _score(self, item: Item, row: SampleRef) -> None:
        item.stored[0] = replace(row, draw=item.draw, sample=0)
        self.items.move(item, DrawState.SCORED)
