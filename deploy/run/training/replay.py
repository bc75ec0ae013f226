"""The replay as the driver calls it: it outlives the death of its process.

The index of the replay has no file. What is durable of it is in the checkpoints, and what happened since the newest of
them has passed through the calls that are made here: leases, acknowledgements, versions. A successor continues from
these, and issues everything else that was in flight again, which is at most what ``replay.max_policy_age`` and the
teacher's lead admit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from deploy.cluster.actor import Actor
from deploy.cluster.failures import ActorGone
from distill.interfaces import Holder, Lease, ReplayUnavailable
from distill.replay.past import IndexPast


class LastingReplay:
    """Calls the methods of :class:`distill.replay.service.ReplayService` by name, like an actor.

    A call that the death of the process cut is made again: each of them may be repeated.
    """

    name = "replay"

    def __init__(
        self,
        actor: Actor,
        state: dict[str, Any] | None,
        revive: Callable[[Exception], Awaitable[None]],
        *,
        deadline_s: float,
    ) -> None:
        """``state``: of the checkpoint from which the run starts. ``revive(error)`` starts the process again, or raises.
        ``deadline_s``: for the successor to take over."""
        self._actor = actor
        self.handle = actor.handle
        """For other actors, which call it themselves."""
        self._revive = revive
        self._deadline_s = deadline_s
        self._taking_over: asyncio.Task[None] | None = None
        self._num_revivals = 0
        self._past = _Past(state)

    async def start(self) -> None:
        """Tell the process what the run has done so far."""
        await self._call("take_over", self._past.of_index())

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: object) -> Awaitable[Any]:
            return self._call(method, *args)

        return call

    async def within(self, seconds: float | None, method: str, *args: object) -> Any:
        """Call a method that answers at once unless the process hangs, which ends it."""
        return await self._call(method, *args, seconds=seconds)

    async def _call(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        while True:
            revivals = self._num_revivals
            try:
                if seconds is None:
                    result = await getattr(self._actor, method)(*args)
                else:
                    result = await self._actor.within(seconds, method, *args)
                break
            except (ActorGone, ReplayUnavailable) as error:
                await self._take_over(revivals, error)
        self._past.note(method, args, result)
        return result

    async def _take_over(self, revivals: int, error: Exception) -> None:
        """Have a successor take over, unless there is one since the call that failed was made.

        It is a task of its own, because the call that noticed the death first may be cancelled.
        """
        if self._num_revivals != revivals:
            return
        if self._taking_over is None or self._taking_over.done():
            self._taking_over = asyncio.create_task(self._start_successor(error))
        await asyncio.shield(self._taking_over)

    async def _start_successor(self, error: Exception) -> None:
        while True:
            await self._revive(error)
            self._past.lineage += 1
            past = self._past.of_index()
            try:
                await self._actor.within(
                    self._deadline_s, "take_over", past, setting="cluster.start_timeout_s"
                )
                break
            except ActorGone as failure:
                error = failure
        self._num_revivals += 1


class _Past:
    """What has happened to the index since the newest durable checkpoint."""

    def __init__(self, state: dict[str, Any] | None) -> None:
        self.lineage = 0
        self.student_shares: list[tuple[int, float]] | None = None
        self._dead: list[Holder] = []
        self._begin(state)

    def _begin(self, state: dict[str, Any] | None) -> None:
        self._state = state
        self._states: dict[int, dict[str, Any]] = {}
        """Of checkpoints that are not durable yet, by their updates."""
        self._leases: dict[int, Lease] = {}
        self._acknowledged = int(state["updates_done"]) if state else 0
        self._versions: list[tuple[int, int]] = []

    def note(self, method: str, args: tuple[Any, ...], result: Any) -> None:
        """Take note of a call that has succeeded."""
        noted = getattr(self, f"_on_{method}", None)
        if noted is not None:
            noted(*args, result)

    def of_index(self) -> IndexPast:
        return IndexPast(
            state=self._state,
            leases=tuple(self._leases[update] for update in sorted(self._leases)),
            updates_acknowledged=self._acknowledged,
            versions=tuple(self._versions),
            student_shares=self.student_shares,
            dead=tuple(self._dead),
            lineage=self.lineage,
        )

    def _on_lease(self, update: int, lease: Lease | None) -> None:
        if lease is not None:
            self._leases[update] = lease
            self._acknowledged = min(self._acknowledged, update)

    def _on_acknowledge(self, update: int, _: None) -> None:
        self._acknowledged = max(self._acknowledged, update + 1)

    def _on_advance(self, updates_done: int, policy_version: int, _: None) -> None:
        self._versions.append((policy_version, updates_done))

    def _on_set_student_share(self, _: float, shares: list[tuple[int, float]]) -> None:
        self.student_shares = shares

    def _on_forget(self, holder: Holder, _: int) -> None:
        self._dead.append(holder)

    def _on_state(self, state: dict[str, Any]) -> None:
        self._states[int(state["updates_done"])] = state

    def _on_commit(self, updates_done: int, _: None) -> None:
        if updates_done in self._states:
            self._keep(self._states[updates_done])

    def _keep(self, state: dict[str, Any]) -> None:
        updates_done = int(state["updates_done"])
        self._state = state
        self._states = {updates: each for updates, each in self._states.items() if updates > updates_done}
        self._leases = {update: lease for update, lease in self._leases.items() if update >= updates_done}
        self._acknowledged = max(self._acknowledged, updates_done)
        # The newest stays, because it says which weights the engines have.
        known = int(state["policy_version"])
        self._versions = [each for each in self._versions[:-1] if each[0] > known] + self._versions[-1:]

    def _on_go_back(self, state: dict[str, Any] | None, forgotten: bool) -> None:
        if forgotten:
            self.lineage += 1
            self.student_shares = None
            self._begin(state)
            return
        if state is not None:
            self._keep(state)
        self._acknowledged = int(state["updates_done"]) if state else 0
