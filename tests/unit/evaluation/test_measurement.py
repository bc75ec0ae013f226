"""Measuring: values per token, sums per prompt, and rows that do not match."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distill.errors import Diverged
from distill.evaluation import METRICS, ScoredChunk
from tests.unit.evaluation.builders import (
    STUDENT,
    TEACHER,
    FakePolicies,
    batches,
    measured,
    row,
    slow_divergences,
)


def test_values_equal_means_over_tokens_of_a_slow_loop():
    policies = FakePolicies()
    found = measured(policies)
    for name, groups in (("teacher_text", TEACHER), ("student_text", STUDENT)):
        rows = [trajectory for group in groups for trajectory in group]
        per_position = [
            slow_divergences(policies.policy[i, t].exp().numpy(), policies.teacher[i, t].exp().numpy())
            | {
                "early": t < len(r.response_tokens) // 3,
                "late": t >= len(r.response_tokens) - len(r.response_tokens) // 3,
            }
            for i, r in enumerate(rows)
            for t in range(len(r.response_tokens))
        ]
        for metric in ("tv", "forward_kl", "reverse_kl"):
            expected = np.mean([position[metric] for position in per_position])
            assert found.value(f"{name}.{metric}") == pytest.approx(expected, rel=1e-5)
        for part in ("early", "late"):
            expected = np.mean([position["tv"] for position in per_position if position[part]])
            assert found.value(f"{name}.tv_{part}") == pytest.approx(expected, rel=1e-5)
        if name == "student_text":
            expected = np.mean([position["entropy"] for position in per_position])
            assert found.value("entropy") == pytest.approx(expected, rel=1e-5)
    assert found.value("length") == pytest.approx(np.mean([4, 1, 2, 3, 3]))
    assert found.value("truncated") == pytest.approx(1 / 5)
    assert found.prompt_indices.tolist() == [2, 5, 7]


def test_rouge_compares_with_the_answers_to_the_same_prompt():
    found = measured()
    sums, weights = found.per_prompt("rouge_l.reference")
    assert weights.tolist() == [2, 2, 0]  # prompt 7 has no reference
    assert sums[0] == pytest.approx(1 / 3 + 1)
    sums, weights = found.per_prompt("rouge_l.teacher")
    assert weights.tolist() == [2, 2, 1]
    assert sums[2] == pytest.approx(2 / 3)  # "w4 w5" against "w4"


def test_order_and_size_of_chunks_do_not_change_the_values():
    first, second = FakePolicies(chunk=4), FakePolicies(chunk=100)
    second.seed = 9
    left, right = measured(first), measured(second)
    for metric in METRICS:
        assert left.estimate(metric) == pytest.approx(right.estimate(metric), rel=1e-6)


def test_masked_tokens_do_not_count():
    masked = [[row("teacher", 2, 0, [1, 2, 3], [True, False, True])], *TEACHER[1:]]
    _, weights = measured(teacher_rows=batches(masked)).per_prompt("teacher_text.tv")
    assert weights.tolist() == [2, 6, 1]


def test_one_source_can_be_measured_without_the_other():
    found = measured(student_rows=[])
    assert found.value("teacher_text.tv") > 0
    assert found.to_dict()["student_text"]["tv"] is None
    assert found.to_dict()["length"] is None


def test_tokens_scored_never_or_twice_are_rejected():
    class Forgets(FakePolicies):
        def __call__(self, rows):
            yield from list(super().__call__(rows))[1:]

    class Repeats(FakePolicies):
        def __call__(self, rows):
            chunks = list(super().__call__(rows))
            yield from [*chunks, chunks[0]]

    class Invents(FakePolicies):
        def __call__(self, rows):
            yield ScoredChunk(torch.tensor([1]), torch.tensor([5]), self.policy[0, :1], self.teacher[0, :1])

    with pytest.raises(ValueError, match=r"must be scored once, was scored 0 times \(4 such tokens"):
        measured(Forgets())
    with pytest.raises(ValueError, match="was scored 2 times"):
        measured(Repeats())
    with pytest.raises(ValueError, match="row 1 has no token 5"):
        measured(Invents())


def test_a_divergence_that_is_not_finite_raises_with_its_position():
    policies = FakePolicies()
    policies.policy[0, 1, 0] = -math.inf
    with pytest.raises(
        Diverged,
        match=r"^teacher_text: forward_kl at token 1 of heldout-0-2/0=inf must be finite \(1 tokens are not\); "
        "lower learner\.learning_rate, or sft\.learning_rate if this is the evaluation before training$",
    ):
        measured(policies)
    policies.policy[0, 1] = math.nan
    with pytest.raises(
        Diverged, match=r"=nan must be finite \(1 tokens are not\); lower learner\.learning_rate"
    ):
        measured(policies)


def test_policies_whose_probabilities_underflow_are_measured():
    """Half of the least float32 number is 0; a mixture of 0 once had an infinite divergence."""
    policies = FakePolicies()
    tail = torch.full((4,), -200.0)
    policies.policy[:] = torch.cat([torch.tensor([-0.693, -103.2]), tail])
    policies.teacher[:] = torch.cat([torch.tensor([-0.693, -150.0]), tail])
    found = measured(policies)
    for text in ("teacher_text", "student_text"):
        np.testing.assert_allclose(found.per_prompt(f"{text}.jsd")[0], 0.0, atol=1e-6)


def test_rows_of_the_wrong_source_or_prompts_are_rejected():
    with pytest.raises(ValueError, match="teacher_text must be rows of source teacher, got student"):
        measured(teacher_rows=batches(STUDENT))
    with pytest.raises(
        ValueError, match="student_text must answer the prompts of teacher_text, but lacks 1 of 3"
    ):
        measured(student_rows=batches(STUDENT[:2]))
    with pytest.raises(ValueError, match="must have rows"):
        measured(student_rows=[], teacher_rows=[])
