"""Divergences of policies so far apart that probabilities underflow, against sums of logarithms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill import objectives

WEIGHT = 0.3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
FUNCTIONS = {
    "generalized_jsd": lambda p, q, w: objectives.generalized_jsd(p, q, w),
    "skew_forward_kl": lambda p, q, w: objectives.skew_forward_kl(p, q, w),
    "skew_reverse_kl": lambda p, q, w: objectives.skew_reverse_kl(p, q, w),
}


def reference(name: str, policy: Tensor, teacher: Tensor, weight: float) -> tuple[float, float]:
    """The divergence of one state by long doubles and logarithms only, and the size of its terms."""
    p, q = (np.maximum(x.double().numpy(), -1e4).astype(np.longdouble) for x in (policy, teacher))

    def mixture(main: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.logaddexp(main + np.log1p(-np.longdouble(weight)), other + np.log(np.longdouble(weight)))

    terms = {
        "generalized_jsd": [(weight, q, mixture(p, q)), (1 - weight, p, mixture(p, q))],
        "skew_forward_kl": [(1.0, q, mixture(p, q))],
        "skew_reverse_kl": [(1.0, p, mixture(q, p))],
    }[name]
    value = sum(c * (np.exp(a) * (a - m)).sum() for c, a, m in terms)
    size = sum(c * (np.exp(a) * (1 + np.abs(a) + np.abs(m))).sum() for c, a, m in terms)
    return float(value), float(size)


LOGIT = st.one_of(st.floats(-300, 0), st.floats(-1, 0), st.floats(-120, -80), st.just(-math.inf))
PAIRS = st.integers(1, 6).flatmap(
    lambda size: st.tuples(*(st.lists(LOGIT, min_size=size, max_size=size) for _ in range(2)))
)


@settings(max_examples=150, deadline=None)
@given(pair=PAIRS, weight=st.sampled_from([1e-30, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4]))
@example(pair=([-0.693, -0.693, -103.2], [-0.693, -0.693, -150.0]), weight=0.5)
@example(pair=([-0.693, -0.693, -100.0], [-100.0, -100.0, 0.0]), weight=1e-44)
@pytest.mark.parametrize("name", FUNCTIONS)
@DTYPES
def test_any_two_policies(name, dtype, pair, weight):
    policy, teacher = (
        torch.tensor([[0.0, *logits]], dtype=torch.float64).log_softmax(-1).to(dtype).requires_grad_()
        for logits in pair
    )
    found = FUNCTIONS[name](policy, teacher, weight)
    expected, size = reference(name, policy.detach()[0], teacher.detach()[0], weight)
    assert found.item() == pytest.approx(expected, rel=0, abs=8 * torch.finfo(dtype).eps * size)
    grads = torch.autograd.grad(found.sum(), [policy, teacher])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("dtype", "policy", "teacher", "rel"),
    [
        (torch.float64, -103.2, -150.0, 1e-12),
        (torch.float64, -200.0, -300.0, 1e-12),
        (torch.float64, -200.0, -200.5, 1e-12),
        (torch.float64, -math.inf, -300.0, 1e-12),
        (torch.float32, -86.0, -95.0, 1e-3),
        (torch.float32, -95.0, -86.0, 1e-3),
        (torch.float32, -100.0, -150.0, 0.2),  # few bits of such a probability are left
    ],
)
def test_the_jsd_of_policies_that_differ_in_a_token_that_hardly_exists(dtype, policy, teacher, rel):
    """Nothing else contributes, so the smallest of errors would show."""
    p, q = (torch.tensor([[0.0, value]], dtype=dtype) for value in (policy, teacher))
    expected, _ = reference("generalized_jsd", p[0, 1:], q[0, 1:], WEIGHT)
    assert objectives.generalized_jsd(p, q, WEIGHT).item() == pytest.approx(expected, rel=rel, abs=0)
    assert objectives.generalized_jsd(q, p, 1 - WEIGHT).item() == pytest.approx(expected, rel=rel, abs=0)


@pytest.mark.parametrize("gap", [1.0, 50.0, 90.0, 150.0, 500.0, 5000.0])
@DTYPES
def test_the_skew_kls_without_skew_are_the_plain_ones_at_any_distance(gap, dtype):
    """Values and gradients."""
    policy = torch.tensor([[0.0, -0.5, -gap], [-gap, -gap - 1, 0.0]], dtype=dtype).log_softmax(-1)
    teacher = policy.flip(-1)
    for skewed, plain in (
        (objectives.skew_forward_kl, objectives.forward_kl),
        (objectives.skew_reverse_kl, objectives.reverse_kl),
    ):
        leaf = policy.clone().requires_grad_()
        values = skewed(leaf, teacher, 0.0), plain(leaf, teacher)
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value.sum(), leaf)[0] for value in values))


@DTYPES
def test_one_far_token_leaves_the_others_bits_alone(dtype):
    """The mixture's logarithm is taken another way only where the mixture underflows."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64).to(dtype).log_softmax(-1)
    far = torch.full((1, 9), -2000.0, dtype=dtype)
    far[0, 0] = 0.0
    together = objectives.generalized_jsd(torch.cat([p, far]), torch.cat([q, far]), WEIGHT)
    assert torch.equal(together[:4], objectives.generalized_jsd(p, q, WEIGHT))
    assert together[4] == 0
