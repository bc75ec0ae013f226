"""The actors of the last stage, by what they are for, and which of them have failed."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.cluster.actor import Actor
from deploy.cluster.failures import ActorGone
from deploy.run.training.replay import LastingReplay
from distill.errors import ConfigError
from distill.interfaces import Holder
from distill.machine.clock import SILENT
from distill.room import NoSpace

_OF_THE_LIVING = ("rollout/num_actors", "teacher/num_actors")
"""Counters that an actor takes along when it leaves."""


@dataclass(frozen=True)
class Member:
    """One actor of a pool."""

    holder: Holder
    actor: Actor


@dataclass
class Fleet:
    """Everyone who works on an update.

    A part that notices the failure of a member reports it here: :class:`deploy.run.training.crew.Crew` starts
    an heir, for which :meth:`heir` waits.
    """

    replay: LastingReplay
    learner: Actor
    rollouts: list[Member]
    """They sample the student; for a recipe without student text, for evaluations only."""
    scorers: list[Member]
    """They fill the payload."""
    teachers: list[Member]
    """They score for evaluations: the scorers, unless those are a proxy's."""
    beat_timeout_s: float | None = 60.0
    """Seconds within which an actor answers a question that costs it nothing. None: it takes its time, because it shares its
    thread with others that compute."""
    stall_timeout_s: float = math.inf
    """Seconds for which an engine may have work without finishing any of it."""
    steady: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held during an evaluation, so that no actor leaves in the middle of it and no row that it needs is deleted."""
    departed: dict[Holder, dict[str, float]] = field(default_factory=dict)
    """The last counters of actors that have left or failed."""
    failures: asyncio.Queue[tuple[Member, Exception]] = field(default_factory=asyncio.Queue)
    """Failures of members that have not been dealt with."""
    _heirs: dict[Holder, asyncio.Future[Member]] = field(default_factory=dict)
    """Of each member that has failed."""
    _newest: dict[Holder, dict[str, float]] = field(default_factory=dict)
    """The counters of each member at its last answer."""

    @property
    def members(self) -> list[Member]:
        """Every member of every pool once."""
        return [*self.rollouts, *self.scorers, *(each for each in self.teachers if each not in self.scorers)]

    # Failures

    def failed(self, member: Member, error: Exception) -> None:
        """Report that a member has failed; only the first report of it counts.

        Raises: the error, if it is a ConfigError or NoSpace, because an heir would fail as well.
        """
        if isinstance(error, ConfigError | NoSpace):
            raise error
        if member in self.members and member.holder not in self._heirs:
            self._heirs[member.holder] = asyncio.get_running_loop().create_future()
            self.failures.put_nowait((member, error))

    def serves(self, member: Member) -> bool:
        """Whether a member has not failed, as far as anyone knows."""
        return member.holder not in self._heirs

    async def heir(self, member: Member) -> Member:
        """The member itself, or the actor that has taken its place after a failure, once it serves."""
        while (heir := self._heirs.get(member.holder)) is not None:
            member = await asyncio.shield(heir)
        return member

    def replace(self, member: Member, heir: Member) -> None:
        """Give an heir, whose engine is loaded, the place of a member that has failed."""
        for pool in self._pools():
            pool[:] = [heir if each is member else each for each in pool]
        self._remember(member)
        self._heirs[member.holder].set_result(heir)

    def leave(self, member: Member) -> None:
        """Take a member out of its pools."""
        for pool in self._pools():
            pool[:] = [each for each in pool if each is not member]
        self._remember(member)

    def _remember(self, member: Member) -> None:
        """Keep the last counters of a member that has left, so that the sums of its pool do not fall."""
        counters = self._newest.pop(member.holder, {})
        self.departed[member.holder] = {
            name: value for name, value in counters.items() if name not in _OF_THE_LIVING
        }

    def _pools(self) -> list[list[Member]]:
        return [self.rollouts, self.scorers, *([self.teachers] if self.teachers is not self.scorers else [])]

    # Counters

    async def stats_of(self, members: Sequence[Member]) -> dict[str, dict[str, float]]:
        """The counters of some members by name; one that does not answer has failed, and has its earlier ones."""
        answers = await asyncio.gather(*(self._counters(each) for each in members))
        return {str(each.holder): stats for each, stats in zip(members, answers, strict=True)}

    async def _counters(self, member: Member) -> dict[str, float]:
        if self.serves(member):
            try:
                counters = await member.actor.within(self.beat_timeout_s, "stats")
                silent_s = counters.pop(SILENT, 0.0)
                self._newest[member.holder] = counters
                if silent_s > self.stall_timeout_s:
                    raise ActorGone.stalled(member.actor.name, silent_s, self.stall_timeout_s)
            except Exception as error:
                self.failed(member, error)
        return self._newest.get(member.holder) or self.departed.get(member.holder, {})

    async def stats_now(self) -> dict[str, dict[str, float]]:
        """The counters of the actors that answer, by name, for a reader who can do without the others."""

        async def of(actor: Actor | LastingReplay) -> dict[str, float]:
            try:
                counters = await actor.within(self.beat_timeout_s, "stats")
                counters.pop(SILENT, None)
                return counters
            except Exception:  # the part that needs it reports it
                return {}

        members = self.members
        *found, replay, learner = await asyncio.gather(
            *(of(each.actor) for each in members), of(self.replay), of(self.learner)
        )
        named = {str(each.holder): stats for each, stats in zip(members, found, strict=True)}
        return named | {"learner": replay | learner}

    async def stats(self) -> dict[str, float]:
        """The counters of all actors; those of a pool are added up. Those of the payload's scorers are the teacher's.

        Raises: ActorFailed when the replay or the learner does not answer.
        """
        counted = ("rollout", self.scorers[0].holder.role)
        departed = [counters for holder, counters in self.departed.items() if holder.role in counted]
        pools, replay, learner = await asyncio.gather(
            self.stats_of([*self.rollouts, *self.scorers]),
            self.replay.within(self.beat_timeout_s, "stats"),
            self.learner.within(self.beat_timeout_s, "stats"),
        )
        failures = Counter(holder.kind for holder in self._heirs)
        return {
            **replay,
            **learner,
            **added([*pools.values(), *departed]),
            "rollout/num_failures": float(failures["rollout"]),
            "teacher/num_failures": float(failures["scoring"]),
        }

    async def spans(self) -> dict[str, Any]:
        """The spans that the replay has recorded since the last call. Raises: ActorFailed if it does not answer."""
        return await self.replay.within(self.beat_timeout_s, "spans")


def added(counters: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sum of some actors' counters, by name."""
    total: dict[str, float] = {}
    for stats in counters:
        for name, value in stats.items():
            total[name] = total.get(name, 0.0) + value
    return total
