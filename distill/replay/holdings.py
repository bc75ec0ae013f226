"""Who holds which work: the one place that knows it.

Used by the index and its tables. A work id is unique among all work that is ever handed out, so whatever
arrives for an id that its sender does not hold is late or was sent twice.
"""

from __future__ import annotations

from collections.abc import Collection

from distill.interfaces import Holder, Work


class Holdings:
    """The work of every actor, in the order in which it was given."""

    def __init__(self) -> None:
        self._held: dict[Holder, dict[str, Work]] = {}
        self._dead: set[Holder] = set()

    def is_dead(self, holder: Holder) -> bool:
        """Whether :meth:`forget` was called for it. A name is never used again, so this stays true."""
        return holder in self._dead

    def give(self, holder: Holder, work: Work) -> None:
        self._held.setdefault(holder, {})[work.work_id] = work

    def holds(self, holder: Holder, work_id: str) -> bool:
        return work_id in self._held.get(holder, ())

    def finish(self, holder: Holder, work_id: str) -> None:
        """Record that the holder no longer has this work."""
        self._held.get(holder, {}).pop(work_id, None)

    def num_held(self, holder: Holder) -> int:
        """Return how many pieces of work an actor holds."""
        return len(self._held.get(holder, {}))

    def holders(self) -> list[Holder]:
        """Return those who hold something."""
        return [holder for holder, held in self._held.items() if held]

    def missing(self, holder: Holder, holding: Collection[str]) -> list[Work]:
        """Return what the holder was given and does not know of: the answer that contained it was lost."""
        known = set(holding)
        return [work for work_id, work in self._held.get(holder, {}).items() if work_id not in known]

    def forget(self, holder: Holder) -> list[Work]:
        """Fence a holder; returns what it held."""
        self._dead.add(holder)
        return list(self._held.pop(holder, {}).values())

    def clear(self) -> None:
        """Forget all work; the dead stay dead."""
        self._held.clear()
