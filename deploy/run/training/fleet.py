"""The actors of the last stage, by what they are for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.cluster.actor import Actor
from distill.interfaces import Holder

STATS_DEADLINE_S = 60.0
"""Seconds within which an actor answers a question that costs it nothing. It may be in the middle of a step."""


@dataclass(frozen=True)
class Member:
    """One actor of a pool."""

    holder: Holder
    actor: Actor


@dataclass
class Fleet:
    """Everyone who works on an update."""

    replay: Actor
    learner: Actor
    rollouts: list[Member]
    """They sample the student; for a recipe without student text, for evaluations only."""
    scorers: list[Member]
    """They fill the payload."""
    teachers: list[Member]
    """They score for evaluations: the scorers, unless those are a proxy's."""
    steady: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held during an evaluation, so that no actor leaves in the middle of it."""
    counting: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the counters of actors are on their way."""
    departed: dict[str, dict[str, float]] = field(default_factory=dict)
    """The last counters of actors that have left."""

    @property
    def members(self) -> list[Member]:
        """Every member of every pool once."""
        return [*self.rollouts, *self.scorers, *(each for each in self.teachers if each not in self.scorers)]

    async def stats_of(self, members: Sequence[Member]) -> dict[str, dict[str, float]]:
        """The counters of some members by name. Raises: ActorFailed for one that does not answer."""
        answers = await asyncio.gather(*(each.actor.within(STATS_DEADLINE_S, "stats") for each in members))
        return {str(each.holder): stats for each, stats in zip(members, answers, strict=True)}

    async def stats_now(self) -> dict[str, dict[str, float]]:
        """The counters of the actors that answer, by name, for a reader who can do without the others."""

        async def of(actor: Actor) -> dict[str, float]:
            try:
                return await actor.within(STATS_DEADLINE_S, "stats")
            except Exception:  # its own deadline ends the run, if it does not come back
                return {}

        members = self.members
        *found, replay, learner = await asyncio.gather(
            *(of(each.actor) for each in members), of(self.replay), of(self.learner)
        )
        named = {str(each.holder): stats for each, stats in zip(members, found, strict=True)}
        return named | {"learner": replay | learner}

    async def stats(self) -> dict[str, float]:
        """The counters of all actors; those of a pool are added up. Those of the payload's scorers are the teacher's.

        Raises: ActorFailed for an actor that does not answer.
        """
        async with self.counting:
            pools, replay, learner = await asyncio.gather(
                self.stats_of([*self.rollouts, *self.scorers]),
                self.replay.within(STATS_DEADLINE_S, "stats"),
                self.learner.within(STATS_DEADLINE_S, "stats"),
            )
        return {**replay, **learner, **added([*pools.values(), *self.departed.values()])}

    async def spans(self) -> dict[str, Any]:
        """The spans that the replay has recorded since the last call. Raises: ActorFailed if it does not answer."""
        return await self.replay.within(STATS_DEADLINE_S, "spans")


def added(counters: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sum of some actors' counters, by name."""
    total: dict[str, float] = {}
    for stats in counters:
        for name, value in stats.items():
            total[name] = total.get(name, 0.0) + value
    return total
