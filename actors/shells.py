"""Shells of the actors. They construct workers, forward calls and report; the workers contain the logic.

:mod:`deploy.cluster.ray_cluster` makes Ray actors of these classes, and :mod:`deploy.cluster.in_process` makes
them objects of one process. A shell receives other actors as handles, whose methods it calls as Ray's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from actors.build import build_corpus_worker, build_rollout, build_teacher_worker
from actors.corpus import CorpusWorker
from actors.replay_client import ReplayClient
from actors.rollout import RolloutWorker
from actors.teacher import TeacherWorker
from distill.config import RunConfig
from distill.interfaces import Holder, SampleRef, WeightManifest
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.index import ReplayIndex
from distill.replay.ledger import Shares
from distill.replay.service import ReplayService
from distill.run.inputs import RunInputs


class ReplayActor(ReplayService):
    """The index of the replay buffer: ids, states and locations, no rows. It starts when the driver has told it what the
    run has done so far."""

    def __init__(self, config: RunConfig, num_prompts: int, num_teacher_rows: int) -> None:
        super().__init__(
            ReplayIndex(
                replay=config.replay,
                plan=BatchPlan.of(config),
                student_order=DrawOrder("student_text", num_prompts, config.seed),
                teacher_order=DrawOrder("teacher_text", num_teacher_rows, config.seed)
                if num_teacher_rows
                else None,
                num_updates=config.learner.num_updates,
                samples_per_prompt=config.rollout.samples_per_prompt,
                pools=Shares(rollout=config.rollout.replicas, scoring=config.scoring.replicas),
            ),
            is_open=False,
        )

    def pid(self) -> int:
        return os.getpid()


class RolloutActor:
    """The shell of a rollout worker."""

    worker: RolloutWorker

    def pid(self) -> int:
        return os.getpid()

    async def start(self, config: RunConfig, inputs: RunInputs, holder: Holder) -> None:
        self.worker = await build_rollout(config, inputs, holder)

    async def run(self, replay: Any) -> None:
        service: Any = ReplayClient(replay)
        await self.worker.run(service)

    async def update_weights(self, manifest: WeightManifest) -> None:
        await self.worker.update_weights(manifest)

    async def sample_heldout(self, numbers: Sequence[int]) -> list[SampleRef]:
        return await self.worker.sample_heldout(numbers)

    async def answer_shown(self) -> list[list[int]]:
        return await self.worker.answer_shown()

    async def release_heldout(self) -> None:
        self.worker.release_heldout()

    async def retire(self) -> None:
        self.worker.retire()

    async def idle(self) -> None:
        await self.worker.idle()

    def stats(self) -> dict[str, float]:
        return self.worker.stats()

    async def close(self) -> None:
        await self.worker.close()


class TeacherActor:
    """The shell of a scorer: of the teacher, or of its proxy."""

    worker: TeacherWorker

    def pid(self) -> int:
        return os.getpid()

    async def start(self, config: RunConfig, inputs: RunInputs, holder: Holder, model_dir: str) -> None:
        self.worker = await build_teacher_worker(config, inputs, holder, model_dir)

    async def run(self, replay: Any) -> None:
        service: Any = ReplayClient(replay)
        await self.worker.run(service)

    async def score_samples(self, samples: Sequence[SampleRef]) -> list[SampleRef]:
        return await self.worker.score_samples(samples)

    async def score_heldout(self, numbers: Sequence[int]) -> list[SampleRef]:
        return await self.worker.score_heldout(numbers)

    async def release_heldout(self) -> None:
        self.worker.release_heldout()

    async def retire(self) -> None:
        self.worker.retire()

    def stats(self) -> dict[str, float]:
        return self.worker.stats()

    async def close(self) -> None:
        await self.worker.close()


class CorpusActor:
    """The shell of a corpus worker; only the corpus stage uses it."""

    worker: CorpusWorker

    def pid(self) -> int:
        return os.getpid()

    async def start(
        self, config: RunConfig, teacher_dir: str, stop_token_ids: Sequence[int], num_tokens: int
    ) -> None:
        self.worker = await build_corpus_worker(config, teacher_dir, stop_token_ids, num_tokens)

    async def write(self, prompts_path: str, num_prompts: int, samples_per_prompt: int, path: str) -> int:
        return await self.worker.write(prompts_path, num_prompts, samples_per_prompt, path)

    async def answer_shown(self, prompts_path: str, path: str) -> None:
        await self.worker.answer_shown(prompts_path, path)

    def stats(self) -> dict[str, float]:
        return self.worker.stats()

    async def close(self) -> None:
        await self.worker.close()
