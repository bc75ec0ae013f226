"""Deletes a writer's segment files when the replay index no longer needs a row in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Protocol

from distill.interfaces import Replay, ReplayUnavailable

INTERVAL_S = 5.0


class SegmentOwner(Protocol):
    """The part of a store that this module needs."""

    def settled_segments(self) -> list[str]: ...

    def delete(self, names: Collection[str]) -> None: ...


@asynccontextmanager
async def deleting_dead_segments(replay: Replay, store: SegmentOwner) -> AsyncIterator[None]:
    """Delete dead segments every few seconds while the context is open. An error ends the context's body."""
    async with asyncio.TaskGroup() as group:
        deleting = group.create_task(_repeat(replay, store))
        yield
        deleting.cancel()


async def delete_dead_segments(replay: Replay, store: SegmentOwner) -> None:
    """Delete the settled segments of which no row is live.

    They cannot get a live row any more, so the question may be asked again, and an answer that is lost does no
    harm.
    """
    if names := store.settled_segments():
        live = await replay.live_segments(names)
        await asyncio.to_thread(store.delete, set(names) - set(live))


async def delete_segments_of(replay: Replay, writers: Collection[str], folders: Sequence[Path]) -> None:
    """Delete the dead segments of writers that have left the run, which cannot do it themselves."""
    paths = [path for folder in folders for path in folder.glob("*.arrow")]
    left = {path.name: path for path in paths if path.stem.rpartition("-")[0] in writers}
    if left:
        live = set(await replay.live_segments(list(left)))
        for path in paths:
            if path.name in left and path.name not in live:
                path.unlink(missing_ok=True)


async def _repeat(replay: Replay, store: SegmentOwner) -> None:
    while True:
        await asyncio.sleep(INTERVAL_S)
        with suppress(ReplayUnavailable):
            await delete_dead_segments(replay, store)
