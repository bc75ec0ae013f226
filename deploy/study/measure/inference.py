"""Samples from the teacher and the student of a run and computes their logits, in float32 on the CPU.

This is plain transformers code, because the measures must not depend on the engine that a run used.
Shapes: T response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.machine.vector_math import settle_vector_math

_BATCH = 256
_SCORING_ROWS = 32

Tokens = list[list[int]]


@dataclass(frozen=True)
class Models:
    """Teacher and student of a run in float32, with their common vocabulary and tokenizer."""

    teacher: Any
    student: Any
    tokenizer: Any
    num_tokens: int

    @classmethod
    def of(cls, teacher: str, student: str) -> Models:
        ours, theirs = (_model(path) for path in (student, teacher))
        num_tokens = min(ours.config.vocab_size, theirs.config.vocab_size)
        return cls(theirs, ours, AutoTokenizer.from_pretrained(teacher), num_tokens)

    def of_teacher(self) -> Models:
        """The same with the teacher in the student's place."""
        return replace(self, student=self.teacher)

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def _model(path: str) -> Any:
    settle_vector_math()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.inference_mode()
def sample(
    model: Any, prompts: Tokens, *, temperature: float, max_new_tokens: int, stream: str
) -> list[list[int]]:
    """Sample one answer per prompt, including the stop token.

    ``stream``: names the sequence of random numbers. Teacher and student must use different streams: with
    the same random numbers, similar models write the same text, and would look closer than they are.
    """
    stop = model.generation_config.eos_token_id
    stops = {stop} if isinstance(stop, int) else set(stop)
    answers: Tokens = []
    torch.manual_seed(xxhash.xxh3_64_intdigest(stream.encode()) >> 1)
    for first in range(0, len(prompts), _BATCH):
        batch = prompts[first : first + _BATCH]
        width = max(map(len, batch))
        rows = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        made = model.generate(
            rows, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            max_new_tokens=max_new_tokens, pad_token_id=next(iter(stops)),
        )  # fmt: skip
        answers += [_until_stop(row, stops) for row in made[:, width:].tolist()]
    return answers


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return tokens[: end + 1]


@torch.inference_mode()
def position_logits(models: Sequence[Any], prompts: Tokens, responses: Tokens) -> Iterator[tuple[Any, ...]]:
    """Yield (row, logits [T, V] of each model) for every row, at the positions that predict its response."""
    for first in range(0, len(prompts), _SCORING_ROWS):
        rows = range(first, min(first + _SCORING_ROWS, len(prompts)))
        whole = [prompts[i] + responses[i] for i in rows]
        width = max(map(len, whole))
        tokens = torch.tensor(
            [row + [0] * (width - len(row)) for row in whole]
        )  # causal models do not see the padding at the end
        outputs = [model(tokens).logits for model in models]
        for place, i in enumerate(rows):
            start, length = len(prompts[i]) - 1, len(responses[i])
            yield i, *(logits[place, start : start + length].float() for logits in outputs)
