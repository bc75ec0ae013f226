"""Held-out evaluation with the learner's own weights: exact divergences over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import torch
from torch import Tensor

from distill.evaluation import ScoredChunk
from learner.batch import token_batch
from learner.student import Student
from learner.vocabulary import Head


class Scorer:
    """Both policies' log-probabilities at every response token of some scored rows."""

    def __init__(self, student: Student, teacher_head: Head, micro_batch_tokens: int, chunk: int) -> None:
        self.student = student
        self.teacher_head = teacher_head
        self.micro_batch_tokens = micro_batch_tokens
        self.chunk = chunk

    def __call__(self, batches: Sequence[pa.RecordBatch]) -> Iterator[ScoredChunk]:
        """Yields chunks of at most ``chunk`` positions, of the common prefix of both vocabularies."""
        batch = token_batch(batches, self.micro_batch_tokens)
        head = Head(self.student.head_weight.detach(), self.student.transform)
        for pack in (pack.to(self.student.device) for pack in batch.packs):
            with torch.no_grad():
                states = self.student.states(pack)
            for where in _slices(pack.targets.shape[0], self.chunk):
                kept = pack.counted[where]
                with torch.no_grad():
                    policy = head.logits(states[where])
                    assert pack.teacher_hidden is not None
                    teacher = self.teacher_head.logits(pack.teacher_hidden[where])
                    policy, teacher = common_logprobs(policy, teacher)
                yield ScoredChunk(
                    row=pack.row[where][kept],
                    step=pack.step[where][kept],
                    policy_logprobs=policy[kept],
                    teacher_logprobs=teacher[kept],
                )


def common_logprobs(policy_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax of both over the common prefix of two padded vocabularies."""
    size = min(policy_logits.shape[-1], teacher_logits.shape[-1])
    return policy_logits[:, :size].log_softmax(-1), teacher_logits[:, :size].log_softmax(-1)


def _slices(length: int, size: int) -> Iterable[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
