"""The teacher worker, a plain class that adds hidden states to rolled-out samples and corpus draws.

It runs :func:`distill.algorithm.score_loop`. :class:`actors.shells.TeacherActor` makes it an actor.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.metered import MeteredTeacher
from distill.algorithm import score, score_loop
from distill.interfaces import Corpus, Draw, Holder, Replay, SampleRef, Teacher, Work
from distill.machine.clock import SILENT
from distill.replay.desk import Desk
from distill.replay.segments import SegmentStore
from distill.replay.tidy import deleting_dead_segments


class TeacherWorker:
    """Scores the work of the replay, and held-out text on request."""

    def __init__(
        self,
        *,
        corpus: Corpus,
        heldout_corpus: Corpus,
        teacher: Teacher,
        store: SegmentStore,
        holder: Holder,
        capacity: int,
        together: bool,
        fills_payload: bool,
    ) -> None:
        """``capacity``: texts at a time. ``fills_payload``: whether the recipe's losses need the hidden states;
        evaluations always do."""
        self.corpus = corpus
        self.heldout_corpus = heldout_corpus
        self.teacher = MeteredTeacher(teacher)
        self.store = store
        self.holder = holder
        self.capacity = capacity
        self.together = together
        self.fills_payload = fills_payload
        self._heldout_samples: list[SampleRef] = []
        self._desk: Desk | None = None

    async def run(self, replay: Replay) -> None:
        """Score until the replay reports the end of the run."""
        self._desk = desk = Desk(
            replay,
            self.holder,
            self.store,
            capacity=1 if self.together else self.capacity,
            clock=self.teacher.clock,
        )
        teacher = self.teacher if self.fills_payload else None
        async with deleting_dead_segments(replay, self.store):
            await score_loop(desk, self.corpus, teacher, self.store, together=self.together)

    async def score_samples(self, samples: Sequence[SampleRef]) -> list[SampleRef]:
        """Score the student's held-out samples."""
        return await self._score_heldout(samples)

    async def score_heldout(self, numbers: Sequence[int]) -> list[SampleRef]:
        """Score the teacher text of some of the held-out prompts."""
        return await self._score_heldout([Draw(table="heldout", number=i, epoch=0, index=i) for i in numbers])

    async def _score_heldout(self, work: Sequence[Work]) -> list[SampleRef]:
        samples = await score(work, self.heldout_corpus, self.teacher, self.store)
        self._heldout_samples += samples
        return samples

    def release_heldout(self) -> None:
        """Give up the held-out rows after the evaluation has read them."""
        self.store.settle(self._heldout_samples)
        self._heldout_samples = []

    def retire(self) -> None:
        """Take no more work; :meth:`run` ends when what is begun is delivered."""
        if self._desk is not None:
            self._desk.retire()

    def stats(self) -> dict[str, float]:
        """Counters. An actor is busy while its engine has texts, and starved while it is idle and holds no text."""
        clock = self.teacher.clock
        return {
            "teacher/num_actors": 1.0,
            "teacher/num_texts": float(self.teacher.num_texts),
            "teacher/num_tokens": float(self.teacher.num_tokens),
            "teacher/num_bytes": float(self.store.num_appended_bytes),
            "teacher/num_diverted": float(self.store.num_diverted),
            SILENT: self.teacher.silent_s,
            "timing/teacher_busy_s": clock.busy_s,
            "timing/teacher_storing_s": clock.storing_s,
            "timing/teacher_starved_s": clock.waiting_s,
        }

    async def close(self) -> None:
        await self.teacher.close()
