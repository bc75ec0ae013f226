"""The shell of the learner: construct, forward, report. One per rank.

:mod:`deploy.cluster.ray_cluster` makes a Ray actor of it, :mod:`deploy.cluster.in_process` an object of this process.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from distill.config import RunConfig, SftConfig
from distill.machine.remote import Remote
from distill.run.inputs import RunInputs
from learner.process.worker import LearnerWorker


class _Samplers:
    """The rollout actor and the one that scores for evaluations as one
    :class:`learner.process.milestones.Samplers`."""

    def __init__(self, rollout: Any, teacher: Any) -> None:
        self.sample_heldout = Remote(rollout).sample_heldout
        self.score_samples = Remote(teacher).score_samples
        self.score_heldout = Remote(teacher).score_heldout
        self._actors = (Remote(rollout), Remote(teacher))

    async def release_heldout(self) -> None:
        await asyncio.gather(*(actor.release_heldout() for actor in self._actors))


class LearnerActor:
    """Holds a learner worker."""

    def __init__(self, config: RunConfig) -> None:
        self.worker = LearnerWorker(config)

    def pid(self) -> int:
        return os.getpid()

    async def fit(self, model_dir: str, corpus: str, out_dir: str, training: SftConfig) -> dict[str, float]:
        return await asyncio.to_thread(self.worker.fit, model_dir, corpus, out_dir, training)

    async def load(self, inputs: RunInputs) -> dict[str, Any] | None:
        return await asyncio.to_thread(self.worker.load, inputs)

    async def train(self, replay: Any, rollout: Any, scorer: Any, teacher: Any) -> dict[str, Any]:
        """``rollout``: the actor that samples, for training or for evaluation alone. ``scorer``: who
        fills the payload; ``teacher``: who scores for evaluations, the same unless there is a proxy."""
        actors: tuple[Any, ...] = (Remote(rollout), Remote(scorer))

        async def stage_stats() -> dict[str, float]:
            found: dict[str, float] = {}
            for stats in await asyncio.gather(*(actor.stats() for actor in actors)):
                found |= stats
            return found

        return await self.worker.train(Remote(replay), _Samplers(rollout, teacher), [actors[0]], stage_stats)

    def facts(self) -> dict[str, Any]:
        return dict(self.worker.facts)
