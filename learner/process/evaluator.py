"""Held-out evaluation with the learner's own weights: exact divergences over the vocabulary.

The rollout actor samples the held-out prompts, the teacher actor scores the samples, and
:func:`distill.evaluation.measure` compares both policies at every token. Called by
:mod:`learner.process.milestones`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from transformers import AutoTokenizer

from distill.data import read_table
from distill.evaluation import Evaluation, ScoredChunk, measure, save_evaluation
from distill.files import write_bytes
from distill.interfaces import SampleRef, Store
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs
from learner.batch import Pack, token_batch
from learner.model.chunked import ChunkedLogits, chunked_blocks
from learner.model.head import Head
from learner.model.student import Student
from learner.update.positions import Heads, teacher_hidden


class HeldoutActors(Protocol):
    """The rollout actor and the teacher actor together, as an evaluation needs them."""

    async def sample_heldout(self, num_prompts: int) -> list[SampleRef]: ...

    async def answer_shown(self) -> list[list[int]]: ...

    async def score_samples(self, samples: Sequence[SampleRef]) -> list[SampleRef]: ...

    async def score_heldout(self, num_rows: int) -> list[SampleRef]: ...

    async def release_heldout(self) -> None: ...


class RolloutAndTeacher:
    """Implements :class:`HeldoutActors` with the handles of two actors."""

    def __init__(self, rollout: Any, teacher: Any) -> None:
        """The arguments are :class:`distill.machine.remote.Remote`, or objects with the workers' methods."""
        self.sample_heldout = rollout.sample_heldout
        self.answer_shown = rollout.answer_shown
        self.score_samples = teacher.score_samples
        self.score_heldout = teacher.score_heldout
        self._actors = (rollout, teacher)

    async def release_heldout(self) -> None:
        await asyncio.gather(*(actor.release_heldout() for actor in self._actors))


class PolicyScorer:
    """Both policies' log-probabilities at every response token of some scored rows."""

    def __init__(self, student: Student, teacher_head: Head, micro_batch_tokens: int, chunk: int) -> None:
        self.student = student
        self.teacher_head = teacher_head
        self.micro_batch_tokens = micro_batch_tokens
        self.chunk = chunk

    def __call__(self, batches: Sequence[pa.RecordBatch]) -> Iterator[ScoredChunk]:
        """Yields blocks of positions, over the common prefix of both vocabularies."""
        heads = Heads.of(self.student, self.teacher_head)
        for pack in token_batch(batches, self.micro_batch_tokens).packs:
            yield from self._of_pack(pack.to(self.student.device), heads)

    def _of_pack(self, pack: Pack, heads: Heads) -> Iterator[ScoredChunk]:
        with torch.no_grad():
            states = self.student.states(pack)
        policy_logits = ChunkedLogits(heads.student, states, self.chunk)
        teacher_logits = ChunkedLogits(heads.teacher, teacher_hidden(pack), self.chunk)
        for where in chunked_blocks(len(states), heads.num_tokens, self.chunk, states.device):
            kept = pack.counted[where]
            yield ScoredChunk(
                row=pack.row[where][kept],
                step=pack.step[where][kept],
                policy_logprobs=policy_logits(where).log_softmax(-1)[kept],
                teacher_logprobs=teacher_logits(where).log_softmax(-1)[kept],
            )


class Evaluator:
    """Measures the current student on held-out prompts, with samples of its live weights."""

    def __init__(
        self, folder: RunFolder, actors: HeldoutActors, store: Store, score: PolicyScorer, texts: HeldoutTexts
    ) -> None:
        self._folder = folder
        self._samplers = actors
        self._store = store
        self._score = score
        self._texts = texts
        self._teacher_rows: list[pa.RecordBatch] = []

    async def evaluate(self, label: str, num_prompts: int, *, keep_answers: bool) -> Evaluation:
        """Measure, and keep the evaluation in the run folder.

        ``keep_answers``: also both models' greedy answers to the shown prompts, as text.
        """
        teacher_rows = await self._teacher_text(num_prompts)
        samples = await self._samplers.sample_heldout(num_prompts)
        scored = await self._samplers.score_samples(samples)
        student_rows = [self._store.read(sample) for sample in scored]
        evaluation = await asyncio.to_thread(
            measure,
            label,
            teacher_rows=teacher_rows,
            student_rows=student_rows,
            score=self._score,
            decode=self._texts.decode,
            references=self._texts.references,
        )
        save_evaluation(self._folder.evaluations, evaluation)
        if keep_answers:
            answers = self._texts.answers(await self._samplers.answer_shown())
            path = self._folder.evaluations / f"{label}-answers.json"
            write_bytes(path, json.dumps(answers, indent=1).encode())
        await self._samplers.release_heldout()
        return evaluation

    async def _teacher_text(self, num_prompts: int) -> list[pa.RecordBatch]:
        """Scored once per run, because neither the text nor the teacher changes. Copied out of the
        segments, which are released after an evaluation."""
        if len(self._teacher_rows) < num_prompts:
            samples = await self._samplers.score_heldout(num_prompts)
            self._teacher_rows = [_owned(self._store.read(sample)) for sample in samples]
        return self._teacher_rows[:num_prompts]


class HeldoutTexts:
    """The held-out references and the shown prompts as text, and the tokenizer that decodes answers."""

    def __init__(self, inputs: RunInputs) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(inputs.teacher_dir, local_files_only=True)
        references = enumerate(read_table(inputs.heldout_prompts)["reference_text"].to_pylist())
        self.references: dict[int, str] = {index: text for index, text in references if text is not None}
        self.decode: Callable[[Sequence[int]], str] = lambda tokens: tokenizer.decode(
            tokens, skip_special_tokens=True
        )
        self._stop_token_ids = inputs.stop_token_ids
        self._shown: list[str] = read_table(inputs.shown_prompts)["prompt_text"].to_pylist()
        self._teacher_answers: list[list[int]] = json.loads(Path(inputs.teacher_answers).read_text())[
            "answers"
        ]

    def answers(self, student_answers: Sequence[Sequence[int]]) -> list[dict[str, str]]:
        """The shown prompts with both models' answers; ``…`` marks an answer that the limit cut."""
        rows = zip(self._shown, self._teacher_answers, student_answers, strict=True)
        return [
            {"prompt": prompt, "teacher": self._text(teacher), "student": self._text(student)}
            for prompt, teacher, student in rows
        ]

    def _text(self, tokens: Sequence[int]) -> str:
        ended = bool(tokens) and tokens[-1] in self._stop_token_ids
        return self.decode(tokens) + ("" if ended else " …")


def _owned(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A copy that does not depend on a mapped file."""
    message = batch.serialize()
    return pa.ipc.read_record_batch(message, batch.schema)
