"""Deletes a writer's segment files when the replay index no longer needs a group in them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol


class SegmentOwner(Protocol):
    def release(self, segments: Mapping[str, int]) -> None: ...


async def release_segments(
    freed: Callable[[str], Awaitable[Mapping[str, int]]],
    store: SegmentOwner,
    writer_id: str,
    interval_s: float = 5.0,
) -> None:
    """Query the index every ``interval_s`` seconds until cancelled. Runs alongside a worker's loop.

    ``freed``: :meth:`distill.replay.service.ReplayService.freed_segments`.
    """
    while True:
        await asyncio.sleep(interval_s)
        store.release(await freed(writer_id))
