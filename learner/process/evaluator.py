"""Held-out measurements with the learner's own weights: exact divergences over the vocabulary.

:func:`distill.evaluation.measure` compares both policies at every token. The driver has the texts sampled and scored
by the other actors. Called by :mod:`learner.process.worker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
from transformers import AutoTokenizer

from distill.data import read_table
from distill.evaluation import Evaluation, ScoredChunk, measure
from distill.run.inputs import RunInputs
from learner.batch import Pack, token_batch
from learner.model.chunked import ChunkedLogits, chunked_blocks
from learner.model.head import Head
from learner.model.student import Student
from learner.update.positions import Heads, teacher_hidden


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
    """Measures a student on held-out prompts."""

    def __init__(self, inputs: RunInputs) -> None:
        self._teacher_rows: list[pa.RecordBatch] = []
        tokenizer: Any = AutoTokenizer.from_pretrained(inputs.teacher_dir, local_files_only=True)
        self._decode: Callable[[Sequence[int]], str] = lambda tokens: tokenizer.decode(
            tokens, skip_special_tokens=True
        )
        references = enumerate(read_table(inputs.heldout_prompts)["reference_text"].to_pylist())
        self._references = {index: text for index, text in references if text is not None}

    @property
    def num_teacher_rows(self) -> int:
        """Rows of the teacher's text that are known."""
        return len(self._teacher_rows)

    def keep_teacher_text(self, rows: Sequence[pa.RecordBatch]) -> None:
        """Keep the teacher's scored text on the first held-out prompts.

        It is the same for the whole run, because neither the text nor the teacher changes. It is copied, because
        the segments of held-out text are given up after an evaluation.
        """
        self._teacher_rows = [_owned(row) for row in rows]

    def measure(self, label: str, student_rows: Sequence[pa.RecordBatch], score: PolicyScorer) -> Evaluation:
        """Measure on the student's scored samples, and on as many rows of the teacher's text.

        ``score``: computes the log-probabilities of the student that has written these samples.
        """
        return measure(
            label,
            teacher_rows=self._teacher_rows[: len(student_rows)],
            student_rows=student_rows,
            score=score,
            decode=self._decode,
            references=self._references,
        )


def _owned(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A copy that does not depend on a mapped file."""
    message = batch.serialize()
    return pa.ipc.read_record_batch(message, batch.schema)
