"""The loops of the actors that make rows, and how actors join and leave a run that goes on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.cluster.failures import ActorFailed
from deploy.run.context import RunContext
from deploy.run.training.fleet import Fleet, Member
from deploy.run.training.publisher import FleetPublisher
from deploy.run.training.start import start_member
from distill.interfaces import Holder, Role
from distill.replay.tidy import INTERVAL_S, delete_segments_of
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs


class Crew:
    """Runs the loop of every actor. A loop that fails ends the task group, and with it the run."""

    def __init__(
        self,
        run: RunContext,
        inputs: RunInputs,
        fleet: Fleet,
        publisher: FleetPublisher,
        group: asyncio.TaskGroup,
    ) -> None:
        self._run = run
        self._inputs = inputs
        self._fleet = fleet
        self._publisher = publisher
        self._group = group
        self._loops: dict[Member, asyncio.Task[None]] = {}
        self._num_joined: Counter[tuple[Role, int]] = Counter()
        self._departed: set[str] = set()
        """Writers of segments that have left."""

    @property
    def payload_role(self) -> Role:
        """The role of the actors that fill the payload."""
        return self._fleet.scorers[0].holder.role

    def start(self) -> None:
        """Start the loops of all actors that make rows."""
        uses_student_text = self._run.config.recipe.uses_student_text
        for member in [*self._fleet.scorers, *(self._fleet.rollouts if uses_student_text else [])]:
            self._start_loop(member)
        self._group.create_task(self._delete_what_is_left())
        self._group.create_task(self._watch())

    def pool(self, role: Role) -> list[Member]:
        """The members of a pool whose loops run."""
        return self._fleet.rollouts if role == "rollout" else self._fleet.scorers

    async def require_room(self, role: Role, count: int, setting: str) -> None:
        """Check that a pool can grow to ``count``. Raises: ConfigError when the node has too little left."""
        more = count - len(self.pool(role))
        if more > 0:
            await asyncio.to_thread(self._run.require_room, role, more, setting)

    async def resize(self, role: Role, count: int) -> None:
        """Let actors join or leave a pool until it has ``count``."""
        pool = self.pool(role)
        taken = {member.holder.number for member in pool}
        free = [number for number in range(count + len(pool)) if number not in taken]
        await asyncio.gather(*(self._join(role, number) for number in free[: max(0, count - len(pool))]))
        for member in sorted(pool, key=lambda each: each.holder.number)[count:]:
            await self._leave(member)

    async def _join(self, role: Role, number: int) -> None:
        """Start an actor, give it the newest weights, and let it work."""
        self._num_joined[role, number] += 1
        restart = self._num_joined[role, number]
        member, loading = await asyncio.to_thread(
            start_member, self._run, self._inputs, role, number, restart=restart
        )
        try:
            await self._loaded(member, loading)
        except Exception:
            await asyncio.to_thread(self._run.backend.end_actor, member.actor.name)
            raise
        async with self._fleet.steady, self._publisher.pinned():
            if role == "rollout" and self._publisher.newest is not None:
                await member.actor.update_weights(self._publisher.newest)
            self.pool(role).append(member)
        self._start_loop(member)

    async def _loaded(self, member: Member, loading: Any) -> None:
        """Wait until an actor's engine is loaded. Raises: ActorFailed, or the actor's own error."""
        timeout_s = self._run.config.cluster.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await member.actor.result(loading)
        except TimeoutError:
            raise ActorFailed.late([member.actor.name], timeout_s) from None

    async def _leave(self, member: Member) -> None:
        """Let an actor finish what it holds, and end it."""
        await member.actor.retire()
        await self._loops.pop(member)
        async with self._fleet.steady, self._fleet.counting, self._publisher.pinned():
            self._fleet.departed |= await self._fleet.stats_of([member])
            self.pool(member.holder.role).remove(member)
        await self._fleet.replay.forget(member.holder)
        self._departed.add(str(member.holder))
        await asyncio.to_thread(self._run.backend.end_actor, member.actor.name)

    def _start_loop(self, member: Member) -> None:
        call = member.actor.run(self._fleet.replay.handle)
        self._loops[member] = self._group.create_task(_result(call))

    async def _watch(self) -> None:
        """Raises: ActorFailed for an actor that has had work for too long."""
        timeout_s = self._run.config.cluster.stall_timeout_s
        while self._is_working:
            await asyncio.wait(self._loops.values(), timeout=min(INTERVAL_S, timeout_s))
            stalled: dict[Holder, float] = await self._fleet.replay.stalled(timeout_s)
            for holder, seconds in stalled.items():
                raise ActorFailed.stalled(str(holder), seconds, timeout_s)

    @property
    def _is_working(self) -> bool:
        return any(not loop.done() for loop in self._loops.values())

    async def _delete_what_is_left(self) -> None:
        """Delete the segments of departed actors as their rows are used up."""
        replay: Any = self._fleet.replay
        folders: Sequence[Path] = (self._inputs.segments, RunFolder(self._inputs.run_dir).replay)
        while self._is_working:
            if self._departed:
                await delete_segments_of(replay, self._departed, folders)
            await asyncio.wait(self._loops.values(), timeout=INTERVAL_S)


async def _result(call: Any) -> None:
    await call
