"""Held-out evaluation with the learner's own weights: exact divergences over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import torch

from distill.evaluation import ScoredChunk
from learner.batch import Pack, token_batch
from learner.model.chunked import ChunkedLogits, chunked_blocks
from learner.model.head import Head
from learner.model.student import Student
from learner.update.positions import Heads, teacher_hidden


class Scorer:
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
