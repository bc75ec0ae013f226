"""The method's identities and the student's gradient, exact on random trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import RecipeConfig
from distill.credit import advantages
from distill.objectives import closed_form_critic, critic_loss, moment_gap, total_variation
from learner.critics import SOURCES, Source
from learner.losses import position_losses
from learner.positions import Policies
from tests.unit.maths import tree

TREES = 100
GAMMA = 0.9


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Policy and teacher log-probabilities [R, S, V] of all trees."""
    return tree.random_logits(TREES, seed).log_softmax(-1), tree.random_logits(TREES, seed + 1).log_softmax(
        -1
    )


def gaps(policy: Tensor, teacher: Tensor, f: Tensor) -> Tensor:
    """[R, S]."""
    shape = policy.shape[:2]
    return moment_gap(policy.flatten(0, 1), teacher.flatten(0, 1), f.flatten(0, 1)).view(shape)


def test_trees_have_both_endings_and_probability_one():
    texts = tree.all_texts()
    policy, _ = pair()
    total = tree.text_logprobs(policy, texts).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert {text[-1] == tree.EOS for text in tree.TEXTS} == {True, False}


@pytest.mark.parametrize("gamma", [GAMMA, 1.0])
def test_performance_difference(gamma):
    """J(π*) − J(π) is L_off with the student's Q, and L_on with the teacher's."""
    policy, teacher = pair()
    rewards = tree.random_logits(TREES, 2)

    def value(q: Tensor, of: Tensor) -> Tensor:
        return (of[:, 0].exp() * q[:, 0]).sum(-1)

    q_policy = tree.action_values(policy, rewards, gamma)
    q_teacher = tree.action_values(teacher, rewards, gamma)
    gap = value(q_teacher, teacher) - value(q_policy, policy)
    off = (tree.occupancy(teacher, gamma) * gaps(policy, teacher, q_policy)).sum(-1)
    on = (tree.occupancy(policy, gamma) * gaps(policy, teacher, q_teacher)).sum(-1)
    torch.testing.assert_close(off, gap)
    torch.testing.assert_close(on, gap)


def test_supremum_of_the_gap_is_twice_the_bound_times_total_variation():
    policy, teacher = (value.flatten(0, 1) for value in pair())
    bound = 1.5
    best = bound * (teacher - policy).sign()
    supremum = 2 * bound * total_variation(policy, teacher)
    torch.testing.assert_close(moment_gap(policy, teacher, best), supremum)
    for seed in range(3):
        f = bound * (2 * torch.rand(policy.shape, generator=torch.Generator().manual_seed(seed)).double() - 1)
        assert (moment_gap(policy, teacher, f) <= supremum).all()


@pytest.mark.parametrize("penalty_times_bound", [2.0, 5.0, 1.0, 0.3])
def test_critic_ascent_reaches_the_closed_form(penalty_times_bound):
    """Projected gradient descent of the critic's loss from f = 0, one free f per state."""
    policy, teacher = (value.flatten(0, 1)[:400] for value in pair())
    bound = 1.5
    penalty = penalty_times_bound / bound
    best = closed_form_critic(policy, teacher, bound, penalty)
    assert best.abs().max() <= bound
    f = torch.zeros_like(policy, requires_grad=True)
    # Each coordinate at its own curvature λ m(a): plain descent would take ages where m is small.
    rate = 0.5 / (penalty * (policy.exp() + teacher.exp()) / 2)
    for _ in range(600):
        (grad,) = torch.autograd.grad(critic_loss(policy, teacher, f, penalty).sum(), f)
        f = (f - rate * grad).clamp(-bound, bound).detach().requires_grad_()
    reached, closed = (critic_loss(policy, teacher, x, penalty) for x in (f.detach(), best))
    torch.testing.assert_close(reached, closed, atol=1e-9, rtol=0)
    if penalty_times_bound >= 2:
        mean = (policy.exp() + teacher.exp()) / 2
        centred = f.detach() - (mean * f.detach()).sum(-1, keepdim=True)
        torch.testing.assert_close(centred, best, atol=1e-6, rtol=0)
        torch.testing.assert_close((mean * best).sum(-1), torch.zeros(len(best), dtype=torch.float64))


def test_the_closed_form_at_the_default_penalty_is_a_tanh_of_the_log_ratio():
    policy, teacher = (value.flatten(0, 1) for value in pair())
    best = closed_form_critic(policy, teacher, 1.5, 2 / 1.5)
    torch.testing.assert_close(best, 1.5 * torch.tanh(0.5 * (teacher - policy)))


# The student's gradient: what the code backpropagates, in exact expectation over texts, against
# finite differences of the objective written out. ``f`` and the texts of an off-policy or
# frozen-text term are constants of both.

TEXTS = tree.all_texts()


def expected_losses(recipe: RecipeConfig, source: Source, occupancy: Tensor, policy: Tensor, teacher: Tensor,
                    f: Tensor | None, next_token: Tensor) -> Tensor:  # fmt: skip
    """[R]: the code's losses over states [R, S] and next tokens [R, S, V] of these probabilities."""

    def repeated(values: Tensor) -> Tensor:
        return values.flatten(0, 1).repeat_interleave(tree.NUM_TOKENS, dim=0)

    both = Policies.from_logits(repeated(policy), repeated(teacher))
    targets = torch.arange(tree.NUM_TOKENS).repeat(TREES * tree.NUM_STATES)
    losses = position_losses(recipe, source, both, targets, f=None if f is None else repeated(f))
    return (losses.view(policy.shape) * occupancy[:, :, None] * next_token).sum((1, 2))


def check_gradient(
    surrogate: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], logits: Tensor
) -> None:
    """Derivatives of both [R] per tree, in three random directions."""
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(surrogate(leaf.log_softmax(-1)).sum(), leaf)
    for seed in range(3):
        direction = tree.random_logits(len(logits), 100 + seed)
        step = 1e-4
        ahead, behind = (value((logits + sign * step * direction).log_softmax(-1)) for sign in (1, -1))
        torch.testing.assert_close(
            (grad * direction).sum((1, 2)), (ahead - behind) / (2 * step), atol=1e-6, rtol=0
        )


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def over(occupancy: Tensor, values: Tensor) -> Tensor:
    return (occupancy * values).sum(-1)


def test_gradient_of_ammd_without_horizon():
    recipe = RecipeConfig(beta=0.25, anchor_weight=0.5)
    policy, teacher = pair()
    f = torch.tanh(tree.random_logits(TREES, 2))
    off_text, on_text = tree.occupancy(teacher, 1.0), tree.occupancy(policy, 1.0)

    def surrogate(p: Tensor) -> Tensor:
        off = expected_losses(recipe, "off", off_text, p, teacher, f, teacher.exp())
        return off + expected_losses(recipe, "on", on_text, p, teacher, f, policy.exp())

    def value(p: Tensor) -> Tensor:
        gap = ((teacher.exp() - p.exp()) * f).sum(-1)
        return over(off_text, 0.75 * gap + 0.5 * kl(teacher, p)) + over(on_text, 0.25 * gap)

    check_gradient(surrogate, value, policy)


def test_gradient_of_kd():
    recipe = RecipeConfig(
        student_text="none", off_policy_text="reference", loss="forward_kl", loss_weight=0.5,
        anchor_weight=0.0, lm_weight=0.5,
    )  # fmt: skip
    policy, teacher = pair(3)
    reference = tree.random_logits(TREES, 5).log_softmax(-1)
    text = tree.occupancy(reference, 1.0)

    def surrogate(p: Tensor) -> Tensor:
        return expected_losses(recipe, "off", text, p, teacher, None, reference.exp())

    def value(p: Tensor) -> Tensor:
        return over(text, 0.5 * kl(teacher, p) - 0.5 * (reference.exp() * p).sum(-1))

    check_gradient(surrogate, value, policy)


def test_gradient_of_gkd():
    """On reference or on the student's own text, the text frozen: GKD has no horizon."""
    recipe = RecipeConfig(
        student_text="mixed", off_policy_text="reference", loss="generalized_jsd", jsd_beta=0.3,
        anchor_weight=0.0,
    )  # fmt: skip
    policy, teacher = pair(6)
    text = tree.occupancy(policy, 1.0)

    def value(p: Tensor) -> Tensor:
        mixture = (0.3 * teacher.exp() + 0.7 * p.exp()).log()
        return over(text, 0.3 * kl(teacher, mixture) + 0.7 * kl(p, mixture))

    for source in SOURCES:
        check_gradient(
            lambda p, source=source: expected_losses(recipe, source, text, p, teacher, None, policy.exp()),
            value,
            policy,
        )


def long_horizon_surrogate(
    recipe: RecipeConfig, teacher: Tensor, f: Tensor, policy: Tensor, members: int
) -> Tensor:
    """[R]: the code's on-policy loss in exact expectation over groups of ``members`` texts.

    Weight γ^t at step t, returns not normalised.
    """
    num_trees, num_texts = len(policy), len(tree.TEXTS)
    texts = torch.cartesian_prod(*[torch.arange(num_texts)] * members).view(-1, members)
    states, tokens, mask = (x[texts] for x in (TEXTS.states, TEXTS.tokens, TEXTS.mask))  # [C, members, T]
    probability = tree.text_logprobs(policy, TEXTS).exp().detach()[:, texts].prod(-1)  # [R, C]
    gap = gaps(policy, teacher, f).detach()[:, states]  # [R, C, members, T]
    rows = num_trees * len(texts) * members
    group = torch.arange(num_trees * len(texts)).repeat_interleave(members)
    row_mask = mask.expand(gap.shape).reshape(rows, tree.DEPTH)
    credit = advantages(gap.reshape(rows, tree.DEPTH), row_mask, group, recipe.gamma, normalize=False)

    def flat(values: Tensor) -> Tensor:
        return values[:, states].flatten(0, -2)

    both = Policies.from_logits(flat(policy), flat(teacher))
    targets = tokens.expand(gap.shape).flatten()
    losses = position_losses(recipe, "on", both, targets, f=flat(f), advantage=credit.flatten())
    weight = probability[:, :, None, None] * mask * recipe.gamma ** torch.arange(tree.DEPTH) / members
    return (losses.view(gap.shape) * weight).sum((1, 2, 3))


@pytest.mark.parametrize(("members", "trees"), [(1, TREES), (2, 3)])
def test_gradient_of_ammd_with_long_horizon(members, trees):
    """The distance on student text depends on the policy through the text too. The mean of the
    other members as baseline changes no expectation."""
    recipe = RecipeConfig(beta=0.4, anchor_weight=0.0, long_weight=1.0, gamma=GAMMA)
    policy, teacher = (value[:trees] for value in pair(9))
    f = torch.tanh(tree.random_logits(trees, 11))

    def value(p: Tensor) -> Tensor:
        return 0.4 * over(tree.occupancy(p, GAMMA), ((teacher.exp() - p.exp()) * f).sum(-1))

    check_gradient(lambda p: long_horizon_surrogate(recipe, teacher, f, p, members), value, policy)


def test_at_the_teacher_every_value_is_zero_and_so_is_every_gradient_that_should_be():
    teacher = tree.random_logits(TREES, 1).log_softmax(-1).flatten(0, 1)
    targets = torch.zeros(len(teacher), dtype=torch.int64)
    any_f = torch.tanh(tree.random_logits(TREES, 2).flatten(0, 1))
    constant_f = any_f[:, :1].expand_as(any_f)

    def at_teacher(f: Tensor, **recipe: Any) -> tuple[Tensor, Tensor]:
        logits = teacher.clone().requires_grad_()
        both = Policies.from_logits(logits, teacher)
        losses = position_losses(RecipeConfig(**recipe), "off", both, targets, f=f)
        return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]

    for loss in ("moment_gap", "forward_kl", "reverse_kl", "generalized_jsd"):
        value, grad = at_teacher(constant_f, loss=loss)
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)
    value, grad = at_teacher(any_f, loss="moment_gap")
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    assert grad.abs().max() > 0.1  # a critic that sees a difference pushes, even where there is none


def test_the_zero_sum_student_follows_the_triangular_witness():
    """With the penalty in view its gradient is −Σ ∇π w, w = f* + (λ/4) f*²."""
    policy, teacher = (value.flatten(0, 1) for value in pair())
    penalty = 2.0
    f = closed_form_critic(policy, teacher, 1.0, penalty)
    logits = policy.clone().requires_grad_()
    both = Policies.from_logits(logits, teacher)
    recipe = RecipeConfig(beta=0.0, anchor_weight=0.0)
    targets = torch.zeros(len(f), dtype=torch.int64)
    losses = position_losses(recipe, "off", both, targets, f=f, variance_penalty=penalty)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    witness = f + penalty / 4 * f**2
    p = policy.exp()
    torch.testing.assert_close(grad, -p * (witness - (p * witness).sum(-1, keepdim=True)))
