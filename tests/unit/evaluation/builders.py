"""A slow reference for the divergences, and rows and policies small enough to check by hand."""

from __future__ import annotations

import math

import numpy as np
import torch

from distill.evaluation import Evaluation, ScoredChunk, measure
from distill.schema import Trajectory, trajectory_batch


def slow_divergences(policy: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """Compute one position token by token, as in the definitions."""
    tv = forward = reverse = entropy = jsd = 0.0
    for p, q in zip(policy, teacher, strict=True):
        tv += abs(p - q) / 2
        if q > 0:
            forward += q * (math.log(q) - math.log(p)) if p > 0 else math.inf
        if p > 0:
            reverse += p * (math.log(p) - math.log(q)) if q > 0 else math.inf
            entropy -= p * math.log(p)
        jsd += sum(x * math.log(2 * x / (p + q)) / 2 for x in (p, q) if x > 0)
    return {"tv": tv, "forward_kl": forward, "reverse_kl": reverse, "jsd": jsd, "entropy": entropy}


VOCABULARY = 6


def row(
    source: str, prompt: int, sample: int, tokens: list[int], mask: list[bool] | None = None
) -> Trajectory:
    student = source == "student"
    return Trajectory(
        draw_id=f"heldout-0-{prompt}",
        source=source,
        prompt_index=prompt,
        sample_index=sample,
        prompt_tokens=[1, 2],
        response_tokens=tokens,
        loss_mask=mask,
        behavior_logprobs=[-1.0] * len(tokens) if student else None,
        policy_versions=[(0, 3)] if student else None,
        finish_reason="length" if len(tokens) == 4 else "stop",
    )


TEACHER = [
    [row("teacher", 2, 0, [1, 2, 3])],
    [row("teacher", 7, 0, [4]), row("teacher", 5, 0, [1, 1, 2, 2, 3, 3])],
]
STUDENT = [
    [row("student", 5, 0, [1, 2, 3, 4]), row("student", 5, 1, [2])],
    [row("student", 7, 0, [4, 5])],
    [row("student", 2, 0, [3, 3, 3]), row("student", 2, 1, [1, 2, 3])],
]


def batches(groups: list[list[Trajectory]]) -> list:
    return [trajectory_batch(group) for group in groups]


class FakePolicies:
    """Random policies at every position, yielded in shuffled chunks."""

    def __init__(self, num_rows: int = 5, num_steps: int = 6, chunk: int = 4):
        random = torch.Generator().manual_seed(0)
        shape = (2, num_rows, num_steps, VOCABULARY)
        self.policy, self.teacher = torch.randn(*shape, generator=random).log_softmax(-1)
        self.chunk = chunk
        self.seed = 0

    def __call__(self, rows):
        lengths = [len(tokens) for batch in rows for tokens in batch["response_tokens"].to_pylist()]
        places = np.array([(i, t) for i, length in enumerate(lengths) for t in range(length)])
        np.random.default_rng(self.seed).shuffle(places)
        for start in range(0, len(places), self.chunk):
            i, t = torch.from_numpy(places[start : start + self.chunk]).T
            yield ScoredChunk(i, t, self.policy[i, t], self.teacher[i, t])


def decode(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def measured(policies=None, **changes) -> Evaluation:
    arguments = {
        "teacher_rows": batches(TEACHER),
        "student_rows": batches(STUDENT),
        "score": policies or FakePolicies(),
        "decode": decode,
        "references": {2: "w1 w2 w3", 5: "w9"},
    }
    return measure("step-3", **(arguments | changes))
