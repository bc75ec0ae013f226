"""Shells of the actors. They construct workers, forward calls and report; the workers contain the logic.

:mod:`deploy.cluster.ray_cluster` makes Ray actors of these classes, and :mod:`deploy.cluster.in_process` makes
them objects of one process. A shell receives other actors as handles, whose methods it calls as Ray's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.build import build_generator, build_rollout, build_teacher_worker
from actors.corpus import write_corpus
from actors.rollout import RolloutWorker
from actors.shown import ShownPrompts
from actors.teacher import TeacherWorker
from distill.config import RunConfig
from distill.data import PromptTable
from distill.files import write_json
from distill.interfaces import GroupRef, WeightManifest
from distill.machine.remote import Remote
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.index import ReplayIndex
from distill.replay.service import ReplayService
from distill.run.inputs import RunInputs

CORPUS_ROWS_PER_CALL = 128
"""Texts of the corpus that the teacher samples together."""


class ReplayActor(ReplayService):
    """The index of the replay buffer: ids, states and locations, no rows."""

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
            )
        )

    def pid(self) -> int:
        return os.getpid()


class RolloutActor:
    """The shell of a rollout worker."""

    worker: RolloutWorker

    def pid(self) -> int:
        return os.getpid()

    async def start(self, config: RunConfig, inputs: RunInputs, writer_id: str) -> None:
        self.worker = await build_rollout(config, inputs, writer_id)

    async def run(self, replay: Any) -> None:
        service: Any = Remote(replay)
        await self.worker.run(service)

    async def update_weights(self, manifest: WeightManifest) -> None:
        await self.worker.update_weights(manifest)

    async def sample_heldout(self, num_prompts: int) -> list[GroupRef]:
        return await self.worker.sample_heldout(num_prompts)

    async def answer_shown(self) -> list[list[int]]:
        return await self.worker.answer_shown()

    async def release_heldout(self) -> None:
        self.worker.release_heldout()

    def stats(self) -> dict[str, float]:
        return self.worker.stats()

    async def close(self) -> None:
        await self.worker.close()


class TeacherActor:
    """The shell of a scorer: of the teacher, or of its proxy."""

    worker: TeacherWorker

    def pid(self) -> int:
        return os.getpid()

    async def start(self, config: RunConfig, inputs: RunInputs, writer_id: str, model_dir: str) -> None:
        self.worker = await build_teacher_worker(config, inputs, writer_id, model_dir)

    async def run(self, replay: Any) -> None:
        service: Any = Remote(replay)
        await self.worker.run(service)

    async def score_samples(self, groups: Sequence[GroupRef]) -> list[GroupRef]:
        return await self.worker.score_samples(groups)

    async def score_heldout(self, num_rows: int) -> list[GroupRef]:
        return await self.worker.score_heldout(num_rows)

    async def release_heldout(self) -> None:
        self.worker.release_heldout()

    def stats(self) -> dict[str, float]:
        return self.worker.stats()

    async def close(self) -> None:
        await self.worker.close()


class CorpusActor:
    """Samples the teacher; only the corpus stage uses it."""

    def pid(self) -> int:
        return os.getpid()

    async def start(
        self, config: RunConfig, teacher_dir: str, stop_token_ids: Sequence[int], num_tokens: int
    ) -> None:
        self.config = config
        self.num_rows = self.num_tokens = 0
        self.generator = await build_generator(
            teacher_dir,
            replace(config.rollout, max_num_seqs=CORPUS_ROWS_PER_CALL),
            max_model_tokens=config.max_model_tokens,
            stop_token_ids=stop_token_ids,
            num_tokens=num_tokens,
            on_push="recompute",
            lock_step=True,
            seed=config.corpus.seed,
        )

    async def write(self, prompts_path: str, num_prompts: int, samples_per_prompt: int, path: str) -> int:
        """Write answers to the first prompts of a table to ``path``; returns the number of response tokens."""
        self.num_rows = self.num_tokens = 0
        corpus = self.config.corpus
        prompts = PromptTable.read(
            prompts_path,
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=corpus.max_new_tokens,
            seed=corpus.seed,
        )
        await write_corpus(
            prompts,
            num_prompts,
            self.generator,
            Path(path),
            rows_per_call=CORPUS_ROWS_PER_CALL,
            progress=self._progress,
        )
        return self.num_tokens

    async def answer_shown(self, prompts_path: str, path: str) -> None:
        """Write the teacher's greedy answers to a table's prompts to ``path``, as JSON lists of token ids."""
        shown = ShownPrompts.read(prompts_path, self.config.corpus.max_new_tokens)
        write_json(Path(path), {"answers": await shown.answers(self.generator)})

    def _progress(self, num_rows: int, num_tokens: int) -> None:
        self.num_rows, self.num_tokens = num_rows, num_tokens

    def stats(self) -> dict[str, float]:
        return {"corpus/num_rows": float(self.num_rows), "corpus/num_tokens": float(self.num_tokens)}

    async def close(self) -> None:
        await self.generator.close()
