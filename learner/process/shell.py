"""The shell of the learner: construct, forward, report. One per rank.

:mod:`deploy.cluster.ray_cluster` makes a Ray actor of it, :mod:`deploy.cluster.in_process` an object of
this process.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distill.config import RunConfig, SftConfig
from distill.evaluation import Evaluation
from distill.interfaces import Lease, SampleRef, WeightManifest
from distill.run.inputs import RunInputs
from learner.process.cut import cut
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
        self.worker = await asyncio.to_thread(LearnerWorker, self._config, inputs)
        return self.worker.resumed_state

    async def update(self, lease: Lease) -> dict[str, float]:
        return await self.worker.update(lease)

    async def skipped(self, update: int) -> dict[str, Any] | None:
        return self.worker.skipped(update)

    async def write_weights(self, policy_version: int, updates_done: int) -> WeightManifest:
        return await self.worker.write_weights(policy_version, updates_done)

    async def num_teacher_rows(self) -> int:
        return self.worker.num_teacher_rows()

    async def keep_teacher_text(self, samples: Sequence[SampleRef]) -> None:
        self.worker.keep_teacher_text(samples)

    async def copy_student(self) -> None:
        await self.worker.copy_student()

    async def measure(self, label: str, samples: Sequence[SampleRef], copy: bool) -> Evaluation:
        return await self.worker.measure(label, samples, copy=copy)

    async def check_teacher(self, samples: Sequence[SampleRef]) -> float:
        return await self.worker.check_teacher(samples)

    async def save(self, updates_done: int, state: dict[str, Any]) -> float:
        return await self.worker.save(updates_done, state)

    async def write_student(self) -> None:
        await self.worker.write_student()

    async def write_best(self, best: Mapping[str, Any], copy: bool) -> None:
        await self.worker.write_best(best, copy=copy)

    def stats(self) -> dict[str, float]:
        return self.worker.stats()

    def _report(self, **facts: Any) -> None:
        self._facts |= facts
