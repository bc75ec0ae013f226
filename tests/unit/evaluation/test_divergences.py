"""Divergences against a slow reference close to the maths, and ROUGE-L of known strings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.evaluation import divergences, measurement, rouge_l
from tests.unit.evaluation.builders import slow_divergences


def check_against_slow(policy_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> None:
    found = divergences(policy_logprobs, teacher_logprobs)
    for i in range(len(policy_logprobs)):
        expected = slow_divergences(
            policy_logprobs[i].double().exp().numpy(), teacher_logprobs[i].double().exp().numpy()
        )
        for name, value in expected.items():
            assert found[name][i].item() == pytest.approx(value, rel=1e-4, abs=2e-6), name


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    positions=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
    masked=st.integers(0, 5),
)
def test_divergences_match_their_definition(seed, positions, vocabulary, scale, masked):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, positions, vocabulary + masked, generator=generator) * scale
    logits[:, :, vocabulary:] = -math.inf
    check_against_slow(*logits.log_softmax(-1))


def test_block_size_does_not_change_the_values(monkeypatch):
    policy, teacher = torch.randn(2, 11, 7).log_softmax(-1)
    whole = divergences(policy, teacher)
    monkeypatch.setattr(measurement, "_BLOCK_NUMBERS", 3 * 7)
    blocked = divergences(policy, teacher)
    assert all(torch.equal(whole[name], blocked[name]) for name in whole)


def test_known_values():
    policy, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    found = {name: value.item() for name, value in divergences(policy, teacher).items()}
    assert found["tv"] == pytest.approx(0.25)
    assert found["forward_kl"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert found["reverse_kl"] == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert found["entropy"] == pytest.approx(math.log(2))


def test_mass_on_an_excluded_token_gives_an_infinite_kl_and_no_nan():
    both, first = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    found = divergences(both, first)
    assert found["reverse_kl"].item() == math.inf
    assert found["forward_kl"].item() == pytest.approx(math.log(2))
    assert divergences(first, both)["forward_kl"].item() == math.inf


def test_equal_policies_have_no_divergence_and_bf16_is_accepted():
    policy = torch.randn(4, 100).log_softmax(-1).bfloat16()
    found = divergences(policy, policy)
    assert all((found[name] == 0).all() for name in ("tv", "forward_kl", "reverse_kl", "jsd"))
    assert found["tv"].dtype == torch.float32


def test_different_vocabularies_are_rejected():
    with pytest.raises(ValueError, match="common prefix"):
        divergences(torch.zeros(2, 5), torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("text", "target", "f1"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("a b c d", "a x c y z w", 0.4),  # LCS 2: precision 2/4, recall 2/6
        ("cats running", "cat run", 0.0),  # no stemmer
        ("", "the cat", 0.0),
        ("dog", "cat", 0.0),
    ],
)
def test_rouge_l_of_known_strings(text, target, f1):
    assert rouge_l(text, target) == pytest.approx(f1)
