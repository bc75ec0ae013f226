"""The long-horizon gradient as an estimator: unbiased, on stale text too, and how much it varies.

On the trees of :mod:`tests.unit.maths.tree` expectations are exact sums over texts; variances are
taken from sampled groups. An estimate is a vector over all logits of a tree.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.credit import advantages, products_before
from tests.unit.maths import tree

GAMMA = 0.9
TEXTS = tree.all_texts()
DISCOUNT = GAMMA ** torch.arange(tree.DEPTH, dtype=torch.float64)


def games(num_trees: int) -> tuple[Tensor, Tensor, Tensor]:
    """Policy, teacher (log-probabilities) and f, [R, S, V]."""
    policy, teacher = (tree.random_logits(num_trees, seed).log_softmax(-1) for seed in (0, 1))
    return policy, teacher, torch.tanh(tree.random_logits(num_trees, 2))


def true_gradient(policy: Tensor, teacher: Tensor, f: Tensor) -> Tensor:
    """[R, S, V]: of L_on, by autograd through the exact distance."""
    logits = policy.clone().requires_grad_()
    p = logits.log_softmax(-1)
    distance = (tree.occupancy(p, GAMMA) * ((teacher.exp() - p.exp()) * f).sum(-1)).sum()
    return torch.autograd.grad(distance, logits)[0]


def estimates(
    policy: Tensor, teacher: Tensor, f: Tensor, texts: Tensor, behavior: Tensor | None = None, *,
    ratio: str = "per_decision", ratio_max: float | None = None, reinforce: bool = False,
    baseline: str = "leave_one_out", normalize: str = "none", weighted: bool = True,
) -> Tensor:  # fmt: skip
    """[R, C, S, V]: an estimate of each of C groups; ``texts`` [R, C, n] numbers them.

    ``reinforce``: every token is charged with its own cost E_π* f − f(s, a) and all that follow, and
    there is no direct term. ``weighted``: by γ^t, as the ``exact`` form does and ``practical`` does not.
    """
    states, tokens, mask = TEXTS.states[texts], TEXTS.tokens[texts], TEXTS.mask[texts]  # [R, C, n, T]
    num_trees, num_groups, members, length = states.shape
    trees = torch.arange(num_trees)[:, None, None, None]
    p = policy.exp()
    gap = ((teacher.exp() - p) * f).sum(-1)
    if reinforce:
        cost = ((teacher.exp() * f).sum(-1, keepdim=True) - f)[trees, states, tokens]
    else:
        cost = gap[trees, states]
    ratios = torch.ones_like(cost)
    if behavior is not None and ratio != "none":
        ratios = (policy - behavior).exp()[trees, states, tokens].clamp_max(ratio_max or torch.inf)
    rows = (num_trees * num_groups * members, length)
    group = torch.arange(num_trees * num_groups).repeat_interleave(members)
    advantage = advantages(
        cost.reshape(rows), mask.reshape(rows), group, GAMMA, span="all" if reinforce else "future",
        normalize=normalize, baseline=baseline, ratios=ratios.reshape(rows) if ratio == "per_decision" else None,
    ).view(cost.shape) * ratios  # fmt: skip
    weight = DISCOUNT * mask if weighted else mask.double()
    if ratio == "per_decision":
        weight = weight * products_before(ratios.reshape(rows)).view(cost.shape)
    here = p[trees, states]  # [R, C, n, T, V]
    chosen = torch.nn.functional.one_hot(tokens, tree.NUM_TOKENS)
    gradient = advantage[..., None] * (chosen - here)
    if not reinforce:
        values = f[trees, states]
        gradient = gradient - here * (values - (here * values).sum(-1, keepdim=True))
    gradient = weight[..., None] * gradient / members
    total = torch.zeros(num_trees, num_groups, tree.NUM_STATES, tree.NUM_TOKENS, dtype=torch.float64)
    index = states.flatten(2)[..., None].expand(-1, -1, -1, tree.NUM_TOKENS)
    return total.scatter_add_(2, index, gradient.flatten(2, 3))


def expectation(policy: Tensor, teacher: Tensor, f: Tensor, behavior: Tensor, **settings: Any) -> Tensor:
    """[R, S, V]: over the texts of the behaviour policy, exactly."""
    every = torch.arange(len(tree.TEXTS)).expand(len(policy), -1)[..., None]
    found = estimates(policy, teacher, f, every, behavior, **settings)
    return (tree.text_logprobs(behavior, TEXTS).exp()[:, :, None, None] * found).sum(1)


def relative_bias(ratio: str, staleness: float, ratio_max: float | None = None) -> float:
    """Of the mean gradient on text of a policy whose logits are ``staleness`` (sd) away."""
    policy, teacher, f = games(100)
    behavior = (policy + staleness * tree.random_logits(100, 5)).log_softmax(-1)
    truth = true_gradient(policy, teacher, f)
    error = expectation(policy, teacher, f, behavior, ratio=ratio, ratio_max=ratio_max) - truth
    return float((error.flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)).median())


def bias_of_practical(gamma_weights: bool, normalize: str, witness: str = "random") -> float:
    """Of the ``practical`` form on fresh text, at the scale that suits it best (its divisors are others):
    the sine of the angle between its mean gradient and that of L_on."""
    policy, teacher, f = games(100)
    if witness == "oracle":
        f = torch.tanh((teacher - policy) / 2)
    truth = true_gradient(policy, teacher, f).flatten(1)
    found = expectation(
        policy, teacher, f, policy, baseline="none", normalize=normalize, weighted=gamma_weights
    ).flatten(1)
    cosine = torch.cosine_similarity(found, truth)
    return float((1 - cosine.square()).clamp_min(0).sqrt().median())


@pytest.mark.parametrize("staleness", [0.0, 0.5])
def test_per_decision_ratios_leave_no_bias(staleness):
    assert relative_bias("per_decision", staleness) < 1e-9


@pytest.mark.parametrize("ratio", ["token", "none"])
def test_the_bias_of_the_cheaper_ratios(ratio):
    """None on fresh text; on text this stale (logits moved by half their spread) it is no detail."""
    assert relative_bias(ratio, 0.0) < 1e-9
    assert 0.05 < relative_bias(ratio, 0.5) < 0.5


def test_the_bias_of_truncation():
    """None without a cut; the lower the cut, the more."""
    biases = [relative_bias("per_decision", 0.5, ratio_max) for ratio_max in (None, 2.0, 1.0)]
    assert biases[0] < 1e-9
    assert 0.001 < biases[1] < biases[2] < 0.5


def test_the_bias_of_the_practical_form():
    """Either of its parts alone turns the gradient, and together they stay within a half."""
    assert bias_of_practical(True, "none") < 1e-6
    uniform, divided = bias_of_practical(False, "none"), bias_of_practical(True, "discount")
    assert 0.01 < uniform < divided < bias_of_practical(False, "discount") < 0.5


def sampled(policy: Tensor, num_groups: int, members: int, seed: int) -> Tensor:
    """[R, C, n]: texts of the policy."""
    generator = torch.Generator().manual_seed(seed)
    probs = tree.text_logprobs(policy, TEXTS).exp()
    drawn = probs.multinomial(num_groups * members, replacement=True, generator=generator)
    return drawn.view(len(policy), num_groups, members)


def test_sampled_groups_are_unbiased():
    """A z-test of every logit's gradient over ten trees, groups of four with their baseline."""
    policy, teacher, f = games(10)
    found = estimates(policy, teacher, f, sampled(policy, 4000, 4, seed=1))
    error = found.mean(1) - true_gradient(policy, teacher, f)
    deviation = found.std(1) / 4000**0.5
    seen = deviation > 1e-6
    z = (error / deviation.clamp_min(1e-12))[seen]
    assert z.abs().max() < 5  # of 1,600 normal values
    assert 0.8 < z.square().mean() < 1.2


def variance_ratios(members: int, num_trees: int = 100, num_groups: int = 400) -> Tensor:
    """[R]: total variance of the direct-plus-future estimate over that of REINFORCE."""
    policy, teacher, f = games(num_trees)
    texts = sampled(policy, num_groups, members, seed=2)
    variance = [
        estimates(policy, teacher, f, texts, reinforce=reinforce).var(1).sum((1, 2))
        for reinforce in (False, True)
    ]
    return variance[0] / variance[1]


@pytest.mark.parametrize("members", [2, 4, 8])
def test_the_direct_term_reduces_variance(members):
    """Against REINFORCE with the same baseline, over 100 trees."""
    ratios = variance_ratios(members)
    assert ratios.median() < 0.25
    assert ratios.max() < 1.0


def test_the_baseline_reduces_variance_where_critics_are_good():
    """Gaps of a good critic are positive at every state, so returns have a mean to subtract. With a
    random f they have none, and the baseline costs a little instead."""
    policy, teacher, _ = games(50)
    f = torch.tanh((teacher - policy) / 2)
    texts = sampled(policy, 400, 4, seed=3)
    with_baseline, without = (
        estimates(policy, teacher, f, texts, baseline=baseline).var(1).sum((1, 2))
        for baseline in ("leave_one_out", "none")
    )
    assert (with_baseline / without).median() < 1.0


if __name__ == "__main__":  # the figures of docs/method.md
    for correction in ("per_decision", "token", "none"):
        print(f"relative bias, ratio {correction}: {relative_bias(correction, 0.5):.2g}")
    for cut in (2.0, 1.0):
        print(f"relative bias, per_decision cut at {cut:g}: {relative_bias('per_decision', 0.5, cut):.2g}")
        print(f"relative bias, token cut at {cut:g}: {relative_bias('token', 0.5, cut):.2g}")
    for kind in ("random", "oracle"):
        parts = [bias_of_practical(*part, kind) for part in
                 ((False, "none"), (True, "discount"), (False, "discount"))]  # fmt: skip
        print(
            f"practical, f {kind}: uniform weights {parts[0]:.2g}, means of returns {parts[1]:.2g}, both {parts[2]:.2g}"
        )
    for size in (2, 4, 8):
        found = variance_ratios(size)
        print(
            f"variance over REINFORCE's, groups of {size}: median {found.median():.2f}, worst {found.max():.2f}"
        )
