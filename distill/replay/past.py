"""What outlives the index of the replay when its process dies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill.interfaces import Holder, Lease, SampleRef


@dataclass(frozen=True, kw_only=True)
class IndexPast:
    """What outlives an index: the driver has it, because it made the calls."""

    state: dict[str, Any] | None
    """Of the newest durable checkpoint; None before the first."""
    leases: tuple[Lease, ...] = ()
    """Of the updates after that, in order."""
    updates_acknowledged: int = 0
    versions: tuple[tuple[int, int], ...] = ()
    """(policy version, updates done) of each announcement since the checkpoint, in order."""
    student_shares: list[tuple[int, float]] | None = None
    """Entries as in :class:`distill.replay.draws.BatchPlan`, if they were set after the checkpoint."""
    dead: tuple[Holder, ...] = ()
    """Actors whose answers are refused."""
    lineage: int = 0
    """How often an index of the run has forgotten what is in flight, so that what is issued after it has ids of its own:
    by its death, and by a :meth:`ReplayIndex.go_back` that returned True."""

    @property
    def payloads(self) -> list[SampleRef]:
        """The rows of teacher text in the leases."""
        groups = (group for lease in self.leases for group in lease.groups)
        return [group.samples[0] for group in groups if group.draw.table == "teacher_text"]
