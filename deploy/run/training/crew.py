"""The loops of the actors that make rows, and how actors join, leave and are replaced in a run that goes on.

There is one way out of every failure of such an actor, whether it exited, lost its engine, did not load a push, or does
not answer: the replay refuses what it may still send and gives its work to others, its processes are killed, and an heir
with its number starts, loads the newest weights and takes its place.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.cluster.actor import Actor
from deploy.cluster.failures import ActorGone, BackendEnded
from deploy.run.context import RunContext
from deploy.run.training.fleet import Fleet, Member
from deploy.run.training.publisher import FleetPublisher
from deploy.run.training.start import learner_actor, start_member
from distill.errors import ConfigError
from distill.files import remove_temporaries
from distill.interfaces import Role
from distill.replay.tidy import INTERVAL_S, delete_segments_of
from distill.room import NoSpace
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs

BEAT_EVERY_S = 5.0
"""Seconds between two looks at whether the actors still answer and finish some of their work."""


class Crew:
    """Runs the loop of every actor, and replaces those that fail as often as the run's budget allows.

    What it raises ends the task group, and with it the run.
    """

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
        self._replaces_learner = False
        self._keepers: list[asyncio.Task[None]] = []
        self._replacements: set[asyncio.Task[None]] = set()
        self._loops: dict[Member, asyncio.Task[None]] = {}
        self._first_restart = run.restarts.num_restarts
        self._num_joined: Counter[tuple[Role, int]] = Counter()
        self._departed: set[str] = set()
        """Writers of segments that have left or failed."""

    @property
    def payload_role(self) -> Role:
        """The role of the actors that fill the payload."""
        return self._fleet.scorers[0].holder.role

    def start(self) -> None:
        """Start the loops of all actors that make rows."""
        uses_student_text = self._run.config.recipe.uses_student_text
        for member in [*self._fleet.scorers, *(self._fleet.rollouts if uses_student_text else [])]:
            self._start_loop(member)
        work = (self._delete_what_is_left, self._beat, self._watch, self._replace_the_failed)
        self._keepers = [self._group.create_task(each()) for each in work]

    def stop(self) -> None:
        """Look after the actors no longer, because the training is over."""
        for task in (*self._keepers, *self._replacements, *self._loops.values()):
            task.cancel()

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
        while len(pool) > count:
            await self._leave(max(pool, key=lambda each: each.holder.number))

    async def replace_learner(self, error: ActorGone) -> dict[str, Any] | None:
        """Start a learner from the newest checkpoint; returns that checkpoint's state, or None before the first.

        Raises: ActorFailed when there were too many restarts.
        """
        began = time.monotonic()
        failure: Exception = error
        self._replaces_learner = True
        while True:
            self._run.note_failure("learner", failure, "it is started again from its newest checkpoint")
            self._run.restarts.take("learner", failure)
            loading = time.monotonic()
            try:
                await asyncio.to_thread(self._run.start_learner)
                learner = learner_actor(self._run)
                state = await self._loaded(learner, self._run.learner.load.remote(self._inputs))
                loading_s = time.monotonic() - loading
                break
            except ActorGone as again:
                failure = again
        self._run.note_damage(state)
        self._fleet.learner = learner
        self._replaces_learner = False
        folder = RunFolder(self._inputs.run_dir)  # what it did not finish
        for place in (self._inputs.weights, folder.checkpoints):
            remove_temporaries(place)
        remove_temporaries(folder.replay, of="weights-")
        if self._run.config.replay.lock_step:  # what is under way belongs to updates that are done again
            await asyncio.gather(*map(self._idle, self._fleet.rollouts))
        await self._fleet.replay.go_back(state["ledger"] if state else None)
        updates_done = state["updates_done"] if state else 0
        self._run.note_replaced("learner", "learner", time.monotonic() - began, loading_s)
        self._run.progress.say(f"the learner goes on after update {updates_done}")
        return state

    async def _idle(self, member: Member) -> None:
        """Wait until an actor holds nothing. Its heir holds nothing from the start."""
        try:
            await member.actor.idle()
        except Exception as error:
            self._fleet.failed(member, error)

    async def _join(self, role: Role, number: int) -> None:
        """Let one more actor work in a pool."""
        member, _ = await self._enter(role, number, self.pool(role).append)
        self._start_loop(member)

    async def _enter(
        self, role: Role, number: int, take_place: Callable[[Member], None]
    ) -> tuple[Member, float]:
        """Start an actor under a name of its own, and let it take its place with the weights that the others have.

        Returns it with the seconds that the start of its process and the load of its model took.
        """
        began = time.monotonic()
        self._num_joined[role, number] += 1
        restart = self._first_restart + self._num_joined[role, number]
        member, loading = await asyncio.to_thread(
            start_member, self._run, self._inputs, role, number, restart=restart
        )
        try:
            await self._loaded(member.actor, loading)
            loading_s = time.monotonic() - began
            async with self._publisher.pinned():
                newest = self._publisher.newest
                if role == "rollout" and newest is not None:
                    deadline_s = self._run.config.weights.deadline_s
                    await member.actor.within(
                        deadline_s, "update_weights", newest, setting="weights.deadline_s"
                    )
                take_place(member)
        except Exception:
            await asyncio.to_thread(self._run.backend.kill_actor, member.actor.name)
            raise
        return member, loading_s

    async def _loaded(self, actor: Actor, loading: Any) -> Any:
        """Wait until an actor has loaded its model; returns what it says. Raises: ActorFailed, or its own error."""
        timeout_s = self._run.config.cluster.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await actor.result(loading)
        except TimeoutError:
            raise ActorGone.late([actor.name], timeout_s) from None

    async def _leave(self, member: Member) -> None:
        """Let an actor finish what it holds, and end it. If it fails, it is replaced, and its heir has to leave."""
        member = await self._fleet.heir(member)
        try:
            await member.actor.within(self._fleet.beat_timeout_s, "retire")
        except Exception as error:
            self._fleet.failed(member, error)
            return
        if (loop := self._loops.get(member)) is None:  # it has failed meanwhile
            return
        await asyncio.wait([loop])
        async with self._fleet.steady, self._publisher.pinned():
            await self._fleet.stats_of([member])
            if not self._fleet.serves(member):
                return
            self._fleet.leave(member)
        del self._loops[member]
        await self._fleet.replay.forget(member.holder)
        self._departed.add(str(member.holder))
        await asyncio.to_thread(self._run.backend.end_actor, member.actor.name)

    def _start_loop(self, member: Member) -> None:
        self._loops[member] = self._group.create_task(self._work(member))

    async def _work(self, member: Member) -> None:
        try:
            await member.actor.run(self._fleet.replay.handle)
        except Exception as error:
            self._fleet.failed(member, error)

    # Failures

    async def _beat(self) -> None:
        """Report actors that do not answer, one of which delays the next question to the others.

        Raises: BackendEnded when no actor can start any more.
        """
        while True:
            self._run.backend.require_life()
            await asyncio.gather(self._fleet.stats_of(self._fleet.members), self._kill_a_silent_learner())
            await asyncio.sleep(BEAT_EVERY_S)

    async def _kill_a_silent_learner(self) -> None:
        """Kill a learner that does not answer: the call that the train loop waits for fails then."""
        if self._replaces_learner:
            return
        learner, pid = self._fleet.learner, self._run.backend.actor_pid("learner")
        try:
            await learner.within(self._fleet.beat_timeout_s, "stats")
        except ActorGone:  # its heir, which may be there by now, has the same name and another process
            await asyncio.to_thread(self._run.backend.kill_actor, learner.name, pid)

    async def _watch(self) -> None:
        """Report actors that have had work for too long."""
        config = self._run.config.cluster
        while True:
            stalled = await self._fleet.replay.within(
                self._fleet.beat_timeout_s, "stalled", config.stall_timeout_s
            )
            for member in self._fleet.members:
                if (seconds := stalled.get(member.holder)) is not None:
                    error = ActorGone.stalled(str(member.holder), seconds, config.stall_timeout_s)
                    self._fleet.failed(member, error)
            await asyncio.sleep(min(BEAT_EVERY_S, config.stall_timeout_s))

    async def _replace_the_failed(self) -> None:
        while True:
            member, error = await self._fleet.failures.get()
            replacement = self._group.create_task(self._replace(member, error))
            self._replacements.add(replacement)
            replacement.add_done_callback(self._replacements.discard)

    async def _replace(self, member: Member, error: Exception) -> None:
        """Fence and kill an actor that has failed, and let its heir take its place.

        Raises: ActorFailed when there were too many restarts; ConfigError when the heir cannot start.
        """
        began = time.monotonic()
        loop = self._loops.pop(member, None)
        if loop is not None:
            loop.cancel()
        await self._fleet.replay.forget(member.holder)
        await asyncio.to_thread(self._run.backend.kill_actor, member.actor.name)
        while True:
            self._run.note_failure(str(member.holder), error, "it is started again")
            self._run.restarts.take(str(member.holder), error)
            try:
                heir, loading_s = await self._enter(
                    member.holder.role,
                    member.holder.number,
                    lambda heir: self._fleet.replace(member, heir),
                )
                break
            except (ConfigError, NoSpace, BackendEnded):
                raise
            except Exception as failure:
                error = failure
        if loop is not None:
            self._start_loop(heir)
        seconds = time.monotonic() - began
        self._run.note_replaced(str(member.holder), str(heir.holder), seconds, loading_s)
        async with self._fleet.steady:  # an evaluation may need what it has written
            self._departed.add(str(member.holder))

    async def _delete_what_is_left(self) -> None:
        """Delete the segments of departed actors as their rows are used up."""
        replay: Any = self._fleet.replay
        folders: Sequence[Path] = (self._inputs.segments, RunFolder(self._inputs.run_dir).replay)
        while True:
            if self._departed:
                await delete_segments_of(replay, self._departed, folders)
            await asyncio.sleep(INTERVAL_S)
