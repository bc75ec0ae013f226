"""What the driver does when a medium is full: it says so, and waits for room.

Rows and weights for which shared memory has no room go to the run folder, which costs time and nothing else. If the disk
has no room either, the part of the run that writes waits, for ``checkpoint.wait_for_room_s`` at most.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar, cast

from distill.interfaces import WeightManifest
from distill.room import IN_MEMORY, NoSpace
from distill.run.inputs import RunInputs

T = TypeVar("T")

_RETRY_S = 2.0
"""Seconds between two attempts to write what did not fit."""


class Room:
    """Repeats writes until there is room for them, and tells the user once."""

    def __init__(
        self,
        wait_s: float,
        say: Callable[[str], None] = lambda text: None,
        event: Callable[..., None] = lambda name, **fields: None,
    ) -> None:
        """``wait_s``: how long a write is repeated. ``say`` prints a line; ``event`` records an event of the run."""
        self._wait_s = wait_s
        self._say = say
        self._event = event
        self._diverted: set[str] = set()

    async def of(self, write: Callable[[], Awaitable[T] | T]) -> T:
        """Call ``write``, again and again while it raises NoSpace; returns its result.

        Raises: the last NoSpace, when there was no room for too long; any other error.
        """
        began: float | None = None
        while True:
            try:
                result = write()
                if inspect.isawaitable(result):
                    result = await result
                break
            except NoSpace as error:
                if began is None:
                    began = time.monotonic()
                    self._note_waiting(error)
                if time.monotonic() - began >= self._wait_s:
                    raise
            await asyncio.sleep(min(_RETRY_S, self._wait_s))
        if began is not None:
            seconds = time.monotonic() - began
            self._event("room_found", seconds=round(seconds, 2))
            self._say(f"there is room again after {seconds:.0f} s")
        return cast(T, result)

    def note_weights(self, manifest: WeightManifest, inputs: RunInputs) -> None:
        """Tell the user if the weights of a push are not in shared memory."""
        if not manifest.path.startswith(f"{inputs.weights}/"):
            self._note_diverted("weights", inputs)

    def note_rows(self, counters: Mapping[str, float], inputs: RunInputs) -> None:
        """Tell the user if rows are not in shared memory. ``counters``: those of all actors."""
        if counters.get("rollout/num_diverted") or counters.get("teacher/num_diverted"):
            self._note_diverted("rows", inputs)

    def _note_waiting(self, error: NoSpace) -> None:
        if self._wait_s == 0:
            return
        self._event("waiting_for_room", error=error.statement, wait_s=self._wait_s)
        self._say(f"warning: {error.statement}; the run waits for room, for at most {self._wait_s:g} s")

    def _note_diverted(self, what: str, inputs: RunInputs) -> None:
        if what in self._diverted:
            return
        self._diverted.add(what)
        folder = inputs.shared_memory.parent
        self._event("shared_memory_full", diverted=what, folder=str(folder))
        self._say(
            f"warning: {folder} has no room for all {what}, so some go to the run folder, which is slower; {IN_MEMORY}"
        )
