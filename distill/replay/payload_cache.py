"""The bytes of live rows per segment, and the cache of scored teacher rows.

Used by the two tables. It handles locations and opens no files.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from distill.interfaces import SampleRef


class SegmentUse:
    """Which segments contain a live row, and how many bytes are live."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self._live: Counter[str] = Counter()

    def add(self, row: SampleRef) -> None:
        self.live_bytes += row.location.num_bytes
        self._live[row.location.segment] += 1

    def remove(self, row: SampleRef) -> None:
        segment = row.location.segment
        self.live_bytes -= row.location.num_bytes
        self._live[segment] -= 1
        if self._live[segment] == 0:
            del self._live[segment]

    def replace(self, old: SampleRef, new: SampleRef) -> None:
        """Move a row. Where the recipe needs no payload, a row keeps its location, and nothing changes."""
        self.add(new)
        self.remove(old)

    def live(self, names: Iterable[str]) -> list[str]:
        """Return those of the segments that contain a live row."""
        return [name for name in names if name in self._live]


class PayloadCache:
    """Scored teacher rows by corpus index; the least recently used are evicted when the buffer is full.

    A row that an admitted draw waits for or uses is pinned and never evicted.
    """

    def __init__(self, segments: SegmentUse, max_bytes: int, rows: Iterable[SampleRef] = ()) -> None:
        """``rows``: scored rows that are known already; of several of one index, the first counts."""
        self._segments = segments
        self._max_bytes = max_bytes
        self._rows: dict[int, SampleRef] = {}
        self._pins: Counter[int] = Counter()
        self._unpinned: OrderedDict[int, None] = OrderedDict()
        """Cached rows that may be evicted, the least recently used first."""
        self.num_hits = 0
        self.num_evicted = 0
        for row in rows:
            if row.draw.index not in self._rows:
                self.put(row.draw.index, row)

    def __len__(self) -> int:
        return len(self._rows)

    def pin(self, index: int) -> SampleRef | None:
        """Pin ``index`` for an admitted draw; returns its row if it is cached."""
        self._pins[index] += 1
        self._unpinned.pop(index, None)
        self.num_hits += index in self._rows
        return self._rows.get(index)

    def unpin(self, index: int) -> None:
        self._pins[index] -= 1
        if self._pins[index] == 0:
            del self._pins[index]
            if index in self._rows:
                self._unpinned[index] = None

    def row(self, index: int) -> SampleRef | None:
        """Return the cached row of ``index``, without counting it as used."""
        return self._rows.get(index)

    def put(self, index: int, row: SampleRef) -> None:
        """Add a scored row. Only missing rows are scored, so no row is added twice."""
        self._segments.add(row)
        self._rows[index] = row
        if index not in self._pins:
            self._unpinned[index] = None

    def evict(self) -> None:
        """Evict rows, the least recently used first, until the buffer fits or the rest is pinned."""
        while self._unpinned and self._segments.live_bytes > self._max_bytes:
            index, _ = self._unpinned.popitem(last=False)
            self._segments.remove(self._rows.pop(index))
            self.num_evicted += 1
