"""The driver's side of a weight push: versions, and the engines that load them.

The version is persisted before anything is written and never used twice, so a crash between two steps
can leave a gap in the versions, but never two sets of weights under one number. The bytes are in one
shared-memory file per node, which the learner writes and every engine on the node maps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from distill.errors import NO_VALUE
from distill.interfaces import WeightManifest, WeightPushError
from distill.weights import remove_old_weights


class FleetPublisher:
    """Implements :class:`distill.interfaces.Publisher` for the engines of a pool."""

    def __init__(
        self,
        learner: Any,
        receivers: Callable[[], Sequence[Any]],
        next_version: Callable[[], int],
        *,
        folder: Path,
        deadline_s: float,
    ) -> None:
        """``learner``: an actor with ``write_weights``. ``receivers``: those with ``update_weights`` that are in
        the pool now. ``folder``: where the files of the weights are."""
        self._learner = learner
        self._receivers = receivers
        self._next_version = next_version
        self._folder = folder
        self._deadline_s = deadline_s
        self._started = 0.0
        self._changing = asyncio.Lock()
        """Held while engines load weights, and while weights must not change."""
        self.waited_s = 0.0
        """Seconds that pushes have waited for weights that were pinned."""
        self.newest: WeightManifest | None = None
        """The weights that every engine has."""
        self.push_s = 0.0
        """Seconds of the last push, from the start of its :meth:`write` to the end of its :meth:`send`."""

    async def write(self, updates_done: int) -> WeightManifest:
        """See :meth:`distill.interfaces.Publisher.write`."""
        self._started = time.monotonic()
        return await self._learner.write_weights(self._next_version(), updates_done)

    async def send(self, manifest: WeightManifest) -> None:
        """See :meth:`distill.interfaces.Publisher.send`. A file stays while an engine still loads it."""
        started, asked = self._started, time.monotonic()
        async with self._changing:
            self.waited_s += time.monotonic() - asked
            await self._load(manifest)
        self.push_s = time.monotonic() - started

    @asynccontextmanager
    async def pinned(self) -> AsyncIterator[None]:
        """The engines keep their weights while the context is open; a push waits."""
        async with self._changing:
            yield

    async def _load(self, manifest: WeightManifest) -> None:
        receivers = self._receivers()
        try:
            async with asyncio.timeout(self._deadline_s):
                await asyncio.gather(*(receiver.update_weights(manifest) for receiver in receivers))
        except TimeoutError as error:
            raise WeightPushError(
                f"push of policy version {manifest.policy_version}", NO_VALUE,
                f"reach all {len(receivers)} engines within weights.deadline_s={self._deadline_s}",
                "raise the deadline, or look for an engine that hangs",
            ) from error  # fmt: skip
        self.newest = manifest
        remove_old_weights(self._folder, before=manifest.policy_version)

    def stats(self) -> dict[str, float]:
        """Counters for the metrics of an update."""
        num_bytes = float(self.newest.num_bytes) if self.newest is not None else 0.0
        return {"timing/push_s": self.push_s, "weights/num_bytes": num_bytes}
