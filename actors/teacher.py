"""The teacher worker, a plain class that adds hidden states to rolled-out groups and corpus draws.

It runs :func:`distill.algorithm.score_loop`. :class:`actors.shells.TeacherActor` makes it an actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.metered import MeteredTeacher
from distill.algorithm import score, score_loop
from distill.interfaces import Corpus, Draw, GroupRef, ScoringJob, Teacher
from distill.replay.segments import SegmentStore
from distill.replay.service import ReplayService
from distill.replay.tidy import release_segments


class TeacherWorker:
    """Scores the jobs of the replay, and held-out text on request."""

    def __init__(
        self,
        *,
        corpus: Corpus,
        heldout_corpus: Corpus,
        teacher: Teacher,
        store: SegmentStore,
        writer_id: str,
        max_groups: int,
        fills_payload: bool,
    ) -> None:
        """``fills_payload``: whether the recipe's losses need the hidden states; evaluations always do."""
        self.corpus = corpus
        self.heldout_corpus = heldout_corpus
        self.teacher = MeteredTeacher(teacher)
        self.store = store
        self.writer_id = writer_id
        self.max_groups = max_groups
        self.fills_payload = fills_payload
        self._heldout_groups: list[GroupRef] = []

    async def run(self, replay: ReplayService) -> None:
        """Score until the replay reports the end of the run."""
        tidy = asyncio.create_task(release_segments(replay.freed_segments, self.store, self.writer_id))
        try:
            teacher = self.teacher if self.fills_payload else None
            await score_loop(replay, self.corpus, teacher, self.store, max_groups=self.max_groups)
        finally:
            tidy.cancel()

    async def score_samples(self, groups: Sequence[GroupRef]) -> list[GroupRef]:
        """Score the student's held-out samples."""
        return await self._score_heldout(ScoringJob(groups=tuple(groups)))

    async def score_heldout(self, num_rows: int) -> list[GroupRef]:
        """Score the teacher text of the first held-out prompts."""
        draws = tuple(Draw(table="heldout", number=i, epoch=0, index=i) for i in range(num_rows))
        return await self._score_heldout(ScoringJob(teacher_draws=draws))

    async def _score_heldout(self, job: ScoringJob) -> list[GroupRef]:
        groups = await score(job, self.heldout_corpus, self.teacher, self.store)
        self._heldout_groups += groups
        return groups

    def release_heldout(self) -> None:
        """Discard the held-out groups after the evaluation has read them."""
        self.store.discard(self._heldout_groups)
        self._heldout_groups = []

    def stats(self) -> dict[str, float]:
        return {
            "teacher/num_tokens": float(self.teacher.num_tokens),
            "timing/teacher_busy_s": self.teacher.clock.busy_s,
        }

    async def close(self) -> None:
        await self.teacher.close()
