"""What the machine could do at most: the arithmetic of an update at its matrix speed, the bytes at its copy speed.

The limit of a stage is the time that its matrix products and its reads of the weights would take, one after the other,
if both ran at the speeds that are measured here. No real stage reaches it: attention, norms, softmax, sampling, the
optimizer and every copy come on top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distill.machine.hardware import computes_in_bfloat16

_SIZE = 2048
_COPY_BYTES = 1 << 28
_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Of this machine with all its cores."""

    flops_per_s: Mapping[str, float]
    """Of a square matrix product, by number format."""
    bytes_per_s: float
    """Of a copy: bytes that are read, which are written as well."""

    @classmethod
    def measure(cls) -> Speeds:
        """The fastest of some repetitions. Where bfloat16 is emulated, nothing computes in it, and it is not measured."""
        flops = {}
        for name in ("float32", "bfloat16") if computes_in_bfloat16() else ("float32",):
            left = torch.randn(_SIZE, _SIZE).to(getattr(torch, name))
            flops[name] = 2 * _SIZE**3 / _fastest_s(lambda left=left: left @ left)
        source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
        target = torch.empty_like(source)
        return cls(flops_per_s=flops, bytes_per_s=_COPY_BYTES / _fastest_s(lambda: target.copy_(source)))


def _fastest_s(work: Any) -> float:
    work()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a causal LM."""

    layer_parameters: int
    """Without the embedding and the head."""
    head_parameters: int
    """Vocabulary times width."""
    bytes_per_number: int = 2
    """In its engine."""
    number_format: str = "bfloat16"

    def flops(self, num_tokens: float, num_distributions: float) -> float:
        """Of a forward pass: two for each parameter and token; the head for those positions that need it."""
        return 2 * (self.layer_parameters * num_tokens + self.head_parameters * num_distributions)

    @property
    def num_bytes(self) -> int:
        return self.bytes_per_number * (self.layer_parameters + self.head_parameters)


@dataclass(frozen=True, kw_only=True)
class Update:
    """The texts of an update of reverse KL on the student's text."""

    prompt_tokens: float
    """Of all texts together."""
    response_tokens: float
    """Likewise."""
    steps: int
    """Decoding steps: the tokens of the longest response."""


def limits_s(
    update: Update, *, teacher: Model, student: Model, speeds: Speeds, training_format: str
) -> dict[str, float]:
    """Seconds of each stage of an update at the machine's speeds.

    rollout: the prompts, then in each step the arithmetic of the texts, and every weight once from memory. teacher: one
    forward pass without the head. learner: forward and backward (three times the arithmetic of a forward pass), the
    teacher's and the student's head at each response token. push: the weights once.
    """
    engine = speeds.flops_per_s[student.number_format]
    training = speeds.flops_per_s[training_format]
    tokens = update.prompt_tokens + update.response_tokens
    reads = (1 + update.steps) * student.num_bytes / speeds.bytes_per_s
    rollout_flops = student.flops(tokens, update.response_tokens)
    learner_flops = 3 * student.flops(tokens, update.response_tokens) + 2 * teacher.head_parameters * (
        update.response_tokens
    )
    return {
        "rollout": rollout_flops / engine + reads,
        "teacher": teacher.flops(tokens, 0) / speeds.flops_per_s[teacher.number_format]
        + teacher.num_bytes / speeds.bytes_per_s,
        "learner": learner_flops / training,
        "push": student.num_bytes / speeds.bytes_per_s,
    }
