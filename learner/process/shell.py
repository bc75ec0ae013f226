"""The shell of the learner: construct, forward, report. One per rank.

:mod:`deploy.cluster.ray_cluster` makes a Ray actor of it, :mod:`deploy.cluster.in_process` an object of
this process.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import torch

from distill.config import RunConfig, SftConfig
from distill.machine.remote import Remote
from distill.run.inputs import RunInputs
from learner.process.cut import cut
from learner.process.evaluator import RolloutAndTeacher
from learner.process.fit import fit
from learner.process.worker import LearnerWorker


class LearnerActor:
    """Holds a learner worker once :meth:`load` has built it; :meth:`cut` and :meth:`fit` need none."""

    worker: LearnerWorker

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._facts: dict[str, Any] = {"activity": "starting"}
        if config.learner.num_threads:
            torch.set_num_threads(config.learner.num_threads)

    def pid(self) -> int:
        return os.getpid()

    def facts(self) -> dict[str, Any]:
        """For the live line; the driver polls them."""
        return dict(self._facts)

    async def cut(self, inputs: RunInputs) -> str:
        """Cut the student from the teacher; returns in words which layers it has."""
        return await asyncio.to_thread(cut, self._config, inputs)

    async def fit(
        self, inputs: RunInputs, model_dir: str, corpus: str, out_dir: str, training: SftConfig
    ) -> dict[str, float]:
        return await asyncio.to_thread(
            fit, self._config, inputs, model_dir, corpus, Path(out_dir), training, self._report
        )

    async def load(self, inputs: RunInputs) -> dict[str, Any] | None:
        """Build the worker; returns the state of the checkpoint that it resumes from."""
        self.worker = await asyncio.to_thread(LearnerWorker, self._config, inputs, self._report)
        return self.worker.resumed_state

    async def train(self, replay: Any, rollout: Any, scorer: Any, teacher: Any) -> dict[str, Any]:
        """``rollout``: the actor that samples, for training or for evaluations only. ``scorer``: fills
        the payload. ``teacher``: scores for evaluations; it is the scorer unless there is a proxy."""
        sampling: Any = Remote(rollout)
        return await self.worker.train(
            Remote(replay),
            RolloutAndTeacher(sampling, Remote(teacher)),
            [sampling],
            [sampling.stats, Remote(scorer).stats],
        )

    def _report(self, **facts: Any) -> None:
        self._facts |= facts
