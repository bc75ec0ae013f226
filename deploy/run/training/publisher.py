"""The driver's side of a weight push: versions, and the engines that load them.

The version is persisted before anything is written and never used twice, so a crash between two steps
can leave a gap in the versions, but never two sets of weights under one number. The bytes are in one
shared-memory file per node, which the learner writes and every engine on the node maps.

A push reaches every engine that serves. One that does not load it in time has failed, and is no part of it: its heir
loads the newest weights before it works.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from deploy.run.training.room import Room
from distill.errors import NO_VALUE
from distill.interfaces import WeightManifest, WeightPushError
from distill.weights import remove_old_weights


def _raise(receiver: Any, error: Exception) -> None:
    raise error


class FleetPublisher:
    """Implements :class:`distill.interfaces.Publisher` for the engines of a pool."""

    def __init__(
        self,
        write: Callable[[int, int], Awaitable[WeightManifest]],
        receivers: Callable[[], Sequence[Any]],
        next_version: Callable[[], int],
        *,
        folders: Sequence[Path],
        deadline_s: float,
        room: Room | None = None,
        failed: Callable[[Any, Exception], None] = _raise,
    ) -> None:
        """``write(policy_version, updates_done)`` copies the learner's weights. ``receivers``: those with
        ``update_weights`` that serve now. ``folders``: where the files of the weights are. ``room``: waits while they do not fit.
        ``failed`` hears of a receiver that did not load a push; without it, the error ends the push."""
        self._write = write
        self._receivers = receivers
        self._next_version = next_version
        self._folders = folders
        self._room = room or Room(0.0)
        self._deadline_s = deadline_s
        self._failed = failed
        self._started = 0.0
        self._num_pins = 0
        self._sending = False
        self._changed = asyncio.Condition()
        """Of the two above: weights are loaded while they are not pinned."""
        self.waited_s = 0.0
        """Seconds that pushes have waited for weights that were pinned."""
        self.newest: WeightManifest | None = None
        """The weights that every engine has."""
        self.push_s = 0.0
        """Seconds of the last push, from the start of its :meth:`write` to the end of its :meth:`send`."""

    async def write(self, updates_done: int) -> WeightManifest:
        """See :meth:`distill.interfaces.Publisher.write`. Raises: NoSpace."""
        self._started = time.monotonic()
        version = await self._room.of(self._next_version)
        return await self._room.of(lambda: self._write(version, updates_done))

    async def send(self, manifest: WeightManifest) -> None:
        """See :meth:`distill.interfaces.Publisher.send`. A file stays while an engine still loads it."""
        started, asked = self._started, time.monotonic()
        async with self._changed:
            await self._changed.wait_for(lambda: not (self._num_pins or self._sending))
            self._sending = True
        self.waited_s += time.monotonic() - asked
        try:
            await self._load(manifest)
        finally:
            await self._change(sending=False)
        self.push_s = time.monotonic() - started

    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[None]:
        """The engines keep their weights while the context is open; a push waits. Several may be open at a time."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._sending)
            self._num_pins += 1
        try:
            yield
        finally:
            await self._change(pins=-1)

    async def _change(self, *, sending: bool | None = None, pins: int = 0) -> None:
        self._num_pins += pins
        self._sending = self._sending if sending is None else sending
        async with self._changed:
            self._changed.notify_all()

    async def _load(self, manifest: WeightManifest) -> None:
        receivers = self._receivers()
        results = await asyncio.gather(
            *(self._load_one(receiver, manifest) for receiver in receivers), return_exceptions=True
        )
        for receiver, result in zip(receivers, results, strict=True):
            if isinstance(result, Exception):
                self._failed(receiver, result)
        self.newest = manifest
        for folder in self._folders:
            remove_old_weights(folder, before=manifest.policy_version)

    async def _load_one(self, receiver: Any, manifest: WeightManifest) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await receiver.update_weights(manifest)
        except TimeoutError as error:
            raise WeightPushError(
                f"push of policy version {manifest.policy_version}", NO_VALUE,
                f"be loaded within weights.deadline_s={self._deadline_s}",
                "raise the deadline, or look for an engine that hangs",
            ) from error  # fmt: skip

    def stats(self) -> dict[str, float]:
        """Counters for the metrics of an update."""
        num_bytes = float(self.newest.num_bytes) if self.newest is not None else 0.0
        return {"timing/push_s": self.push_s, "weights/num_bytes": num_bytes}
