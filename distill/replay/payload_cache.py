"""The bytes of live groups per segment, and the cache of scored teacher rows.

Used by the two tables. It handles locations and opens no files.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

from distill.interfaces import GroupRef


class SegmentUse:
    """Which segments contain a live group, and how many bytes are live.

    A writer may delete a segment only when every group that it wrote there was inserted and is
    dead. Groups that are written but not yet inserted are unknown here, so a freed segment is reported with the
    number of groups that were ever inserted from it.
    """

    def __init__(self) -> None:
        self.live_bytes = 0
        self._live: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._freed: set[str] = set()

    def add(self, group: GroupRef) -> None:
        segment = group.location.segment
        self.live_bytes += group.location.num_bytes
        self._live[segment] += 1
        self._seen[segment] += 1
        self._freed.discard(segment)

    def remove(self, group: GroupRef) -> None:
        segment = group.location.segment
        self.live_bytes -= group.location.num_bytes
        self._live[segment] -= 1
        if self._live[segment] == 0:
            del self._live[segment]
            self._freed.add(segment)

    def replace(self, old: GroupRef, new: GroupRef) -> None:
        """Move a group. Where the recipe needs no payload, a group keeps its location, and nothing changes."""
        if old.location != new.location:
            self.remove(old)
            self.add(new)

    def take_freed(self, writer_prefix: str) -> dict[str, int]:
        """Return a writer's segments freed since the last call, each with its number of groups ever inserted."""
        names = sorted(name for name in self._freed if name.rpartition("-")[0] == writer_prefix)
        self._freed.difference_update(names)
        return {name: self._seen[name] for name in names}


class PayloadCache:
    """Scored teacher rows by corpus index; the least recently used are evicted when the buffer is full.

    A row that an admitted draw waits for or uses is pinned and never evicted.
    """

    def __init__(self, segments: SegmentUse, max_bytes: int) -> None:
        self._segments = segments
        self._max_bytes = max_bytes
        self._rows: OrderedDict[int, GroupRef] = OrderedDict()
        self._pins: Counter[int] = Counter()
        self.num_hits = 0
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._rows)

    def pin(self, index: int) -> GroupRef | None:
        """Pin ``index`` for an admitted draw; returns its row if it is cached."""
        self._pins[index] += 1
        row = self._rows.get(index)
        if row is not None:
            self._rows.move_to_end(index)
            self.num_hits += 1
        return row

    def unpin(self, index: int) -> None:
        self._pins[index] -= 1
        if self._pins[index] == 0:
            del self._pins[index]

    def put(self, index: int, row: GroupRef) -> None:
        """Add a scored row. Only missing rows are scored, so no row is added twice."""
        self._segments.add(row)
        self._rows[index] = row

    def evict(self) -> None:
        """Evict rows, the least recently used first, until the buffer fits or the rest is pinned."""
        if self._segments.live_bytes <= self._max_bytes:
            return
        for index in [index for index in self._rows if index not in self._pins]:
            self._segments.remove(self._rows.pop(index))
            self.num_evicted += 1
            if self._segments.live_bytes <= self._max_bytes:
                return
