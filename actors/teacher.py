"""The teacher scorer: hidden states for rolled-out groups and corpus draws, as a plain class.

Runs :func:`distill.algorithm.score_loop`. The actor's shell is :class:`actors.shells.TeacherActor`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from distill.algorithm import score, score_loop
from distill.interfaces import Corpus, Draw, GroupRef, ScoringJob, Teacher
from distill.replay.segments import SegmentStore
from distill.replay.service import ReplayService
from distill.replay.tidy import release_segments


class MeteredTeacher:
    """A teacher that counts tokens and busy seconds."""

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner
        self.hidden_size = inner.hidden_size
        self.num_tokens = 0
        self.busy_s = 0.0

    async def hidden_states(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        start = time.monotonic()
        states = await self.inner.hidden_states(prompts, responses)
        self.busy_s += time.monotonic() - start
        self.num_tokens += sum(map(len, prompts)) + sum(map(len, responses))
        return states

    async def close(self) -> None:
        await self.inner.close()


class TeacherScorer:
    """Scores whatever the replay asks for, and held-out text on request."""

    def __init__(
        self,
        *,
        corpus: Corpus,
        heldout_corpus: Corpus,
        teacher: Teacher,
        store: SegmentStore,
        writer_id: str,
        max_groups: int,
    ) -> None:
        self.corpus = corpus
        self.heldout_corpus = heldout_corpus
        self.teacher = MeteredTeacher(teacher)
        self.store = store
        self.writer_id = writer_id
        self.max_groups = max_groups
        self._heldout_groups: list[GroupRef] = []

    async def run(self, replay: ReplayService) -> None:
        """Until the replay says that the run is over."""
        tidy = asyncio.create_task(release_segments(replay.freed_segments, self.store, self.writer_id))
        try:
            await score_loop(replay, self.corpus, self.teacher, self.store, max_groups=self.max_groups)
        finally:
            tidy.cancel()

    async def score_samples(self, groups: Sequence[GroupRef]) -> list[GroupRef]:
        """The student's held-out samples, scored."""
        return await self._score_heldout(ScoringJob(groups=tuple(groups)))

    async def score_heldout(self, num_rows: int) -> list[GroupRef]:
        """The teacher's own text on the first held-out prompts, scored."""
        draws = tuple(Draw(table="heldout", number=i, epoch=0, index=i) for i in range(num_rows))
        return await self._score_heldout(ScoringJob(teacher_draws=draws))

    async def _score_heldout(self, job: ScoringJob) -> list[GroupRef]:
        groups = await score(job, self.heldout_corpus, self.teacher, self.store)
        self._heldout_groups += groups
        return groups

    def release_heldout(self) -> None:
        """The evaluation has read them."""
        self.store.discard(self._heldout_groups)
        self._heldout_groups = []

    def stats(self) -> dict[str, float]:
        return {
            "teacher/num_tokens": float(self.teacher.num_tokens),
            "timing/teacher_busy_s": self.teacher.busy_s,
        }

    async def close(self) -> None:
        await self.teacher.close()
