"""The method's identities and the student's gradient, exact on random trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deploy
from distill.config import MethodConfig, RecipeConfig
from distill.config.load import load_config
from distill.credit import advantages
from distill.objectives import closed_form_critic, critic_loss, moment_gap, sign_critic, total_variation
from learner.batch import Text
from learner.update.losses import DIVERGENCES, position_losses
from learner.update.positions import Policies
from tests.unit.maths import tree

CONFIGS = Path(deploy.__file__).parent / "configs"
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
    torch.testing.assert_close(off, gap, atol=1e-9, rtol=0)
    torch.testing.assert_close(on, gap, atol=1e-9, rtol=0)


def test_supremum_of_the_gap_is_twice_the_bound_times_total_variation():
    policy, teacher = (value.flatten(0, 1) for value in pair())
    bound = 1.5
    best = bound * (teacher - policy).sign()
    supremum = 2 * bound * total_variation(policy, teacher)
    torch.testing.assert_close(moment_gap(policy, teacher, best), supremum, atol=1e-9, rtol=0)
    for seed in range(3):
        f = bound * (2 * torch.rand(policy.shape, generator=torch.Generator().manual_seed(seed)).double() - 1)
        assert (moment_gap(policy, teacher, f) <= supremum).all()


@pytest.mark.parametrize("penalty_times_bound", [2.0, 5.0, 1.0, 0.3])
def test_critic_ascent_reaches_the_closed_form(penalty_times_bound):
    """Projected gradient descent of the critic's loss from f = 0, one free f per state."""
    policy, teacher = (value.flatten(0, 1)[:120] for value in pair())
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
# finite differences of the objective written out, for every recipe under ``credit.form=exact``.
# The witness's values, the costs and the texts of a term without horizon are constants of both.

TEXTS = tree.all_texts()
RECIPES = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))


def exact_method(name: str, **recipe: Any) -> MethodConfig:
    """A preset in the exact form: no clips, no whitening, no divisors."""
    method = load_config(CONFIGS / "demo.yaml", [f"recipe={name}"], CONFIGS).method
    baseline = "none" if method.credit.baseline == "whiten" else method.credit.baseline
    credit = replace(
        method.credit, form="exact", normalize="none", baseline=baseline, ratio="none", ppo_clip=None
    )
    return replace(method, recipe=replace(method.recipe, gamma=GAMMA, **recipe), credit=credit)


@dataclass(frozen=True)
class Game:
    """Policies [R, S, V] of some trees, and what does not move with the student."""

    method: MethodConfig
    policy: Tensor
    teacher: Tensor
    reference: Tensor
    f: Tensor

    @staticmethod
    def of(method: MethodConfig, trees: int = TREES) -> Game:
        policy, teacher, reference = (tree.random_logits(trees, seed).log_softmax(-1) for seed in (9, 10, 12))
        f = torch.tanh(tree.random_logits(trees, 11))
        critic, pair = method.critic, (policy.flatten(0, 1), teacher.flatten(0, 1))
        if critic.form == "closed_form":
            f = closed_form_critic(*pair, critic.bound, critic.penalty).view(policy.shape)
        if critic.form == "sign":
            f = sign_critic(*pair, critic.bound).view(policy.shape)
        return Game(method, policy, teacher, reference, f)

    @property
    def off_text(self) -> Tensor:
        return self.reference if self.method.recipe.teacher_text == "reference" else self.teacher

    @property
    def cost(self) -> Tensor:
        """[R, S, V]: what choosing a token costs, at the policy of now."""
        credit = self.method.credit
        if credit.cost == "moment_gap":
            cost = main_loss(self, "moment_gap", self.policy)[:, :, None].expand_as(self.policy)
        else:
            cost = self.policy - self.teacher
        return cost / credit.cost_scale


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def over(occupancy: Tensor, values: Tensor) -> Tensor:
    return (occupancy * values).sum(-1)


def main_loss(game: Game, name: str, p: Tensor) -> Tensor:
    """[R, S], from the definitions."""
    recipe, critic, teacher, f = game.method.recipe, game.method.critic, game.teacher, game.f
    if name == "forward_kl":
        return kl(teacher, p)
    if name == "reverse_kl":
        return kl(p, teacher)
    if name == "generalized_jsd":
        b = recipe.jsd_beta
        mixture = (b * teacher.exp() + (1 - b) * p.exp()).log()
        return b * kl(teacher, mixture) + (1 - b) * kl(p, mixture)
    if name == "skew_forward_kl":
        return kl(teacher, (recipe.skew * teacher.exp() + (1 - recipe.skew) * p.exp()).log())
    if name == "skew_reverse_kl":
        return kl(p, ((1 - recipe.skew) * teacher.exp() + recipe.skew * p.exp()).log())
    gap = ((teacher.exp() - p.exp()) * f).sum(-1)
    if critic.zero_sum:
        m = (teacher.exp() + p.exp()) / 2
        gap = gap - critic.penalty / 2 * ((m * f**2).sum(-1) - (m * f).sum(-1) ** 2)
    return gap


def objective(game: Game, p: Tensor) -> Tensor:
    """[R]: the recipe's objective; every term but those of the long horizon on text that stays."""
    recipe, credit = game.method.recipe, game.method.credit
    both_texts = recipe.student_text == "every_update" and recipe.teacher_text != "none"
    w_off, w_on = (1 - recipe.beta, recipe.beta) if both_texts else (1.0, 1.0)
    total = torch.zeros(len(p), dtype=torch.float64)
    if recipe.teacher_text != "none":
        text = tree.occupancy(game.off_text, GAMMA)
        values = recipe.anchor_weight * main_loss(game, recipe.anchor, p)
        values = values - recipe.lm_weight * (game.off_text.exp() * p).sum(-1)
        if recipe.loss_weight:
            values = values + w_off * recipe.loss_weight * main_loss(game, recipe.loss, p)
        total = total + over(text, values)
    if recipe.student_text != "none":
        frozen, moving = tree.occupancy(game.policy, GAMMA), tree.occupancy(p, GAMMA)
        if recipe.loss_weight:
            name = recipe.student_text_loss or recipe.loss
            total = total + w_on * recipe.loss_weight * over(frozen, main_loss(game, name, p))
        text = frozen if credit.span == "own" else moving
        chosen = game.policy if credit.span == "future" else p
        charged = over(text, (chosen.exp() * game.cost).sum(-1))
        total = total + w_on * recipe.long_weight * charged
    return total


def direct_losses(game: Game, text: Text, p: Tensor) -> Tensor:
    """[R]: the code's losses without credit, over the states and next tokens of a text."""
    writer = game.policy if text == "student_text" else game.off_text

    def repeated(values: Tensor) -> Tensor:
        return values.flatten(0, 1).repeat_interleave(tree.NUM_TOKENS, dim=0)

    both = Policies.from_logits(repeated(p), repeated(game.teacher))
    targets = torch.arange(tree.NUM_TOKENS).repeat(len(p) * tree.NUM_STATES)
    method = game.method
    losses = position_losses(
        method.recipe, text, both, targets, f=repeated(game.f),
        variance_penalty=method.critic.penalty if method.critic.zero_sum else 0.0,
    )  # fmt: skip
    weight = tree.occupancy(writer, GAMMA)[:, :, None] * writer.exp()
    return (losses.view(p.shape) * weight).sum((1, 2))


def score_losses(game: Game, p: Tensor, members: int) -> Tensor:
    """[R]: what credit adds to the code's on-policy loss, in exact expectation over groups."""
    method, num_trees = game.method, len(p)
    credit = method.credit
    texts = torch.cartesian_prod(*[torch.arange(len(tree.TEXTS))] * members).view(-1, members)
    states, tokens, mask = (x[texts] for x in (TEXTS.states, TEXTS.tokens, TEXTS.mask))  # [C, members, T]
    probability = tree.text_logprobs(game.policy, TEXTS).exp()[:, texts].prod(-1)  # [R, C]
    cost = game.cost[:, states, tokens]  # [R, C, members, T]
    rows = num_trees * len(texts) * members
    group = torch.arange(num_trees * len(texts)).repeat_interleave(members)
    row_mask = mask.expand(cost.shape).reshape(rows, tree.DEPTH)
    advantage = advantages(
        cost.reshape(rows, tree.DEPTH), row_mask, group, GAMMA, span=credit.span, normalize="none",
        baseline=credit.baseline,
    )  # fmt: skip

    def flat(values: Tensor) -> Tensor:
        return values[:, states].flatten(0, -2)

    both = Policies.from_logits(flat(p), flat(game.teacher))
    score_only = replace(method.recipe, loss_weight=0.0)
    losses = position_losses(
        score_only, "student_text", both, tokens.expand(cost.shape).flatten(), advantage=advantage.flatten()
    )
    weight = probability[:, :, None, None] * mask * GAMMA ** torch.arange(tree.DEPTH) / members
    return (losses.view(cost.shape) * weight).sum((1, 2, 3))


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


def check_recipe(game: Game, members: int) -> None:
    recipe = game.method.recipe

    def surrogate(p: Tensor) -> Tensor:
        total = torch.zeros(len(p), dtype=torch.float64)
        if recipe.teacher_text != "none":
            total = total + direct_losses(game, "teacher_text", p)
        if recipe.student_text != "none":
            total = total + direct_losses(game, "student_text", p)
            if recipe.long_weight:
                total = total + score_losses(game, p, members)
        return total

    check_gradient(surrogate, lambda p: objective(game, p), game.policy)


@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_of_every_recipe(name):
    check_recipe(Game.of(exact_method(name)), members=1)


@pytest.mark.parametrize("name", ["ammd", "ammd_paper", "oracle_tv", "oracle_skl", "triangular"])
def test_the_gradient_of_a_game_with_the_long_horizon(name):
    """The distance on student text depends on the policy through the text too: the whole gradient
    of L_on. The mean of the group's other members as baseline changes no expectation."""
    method = exact_method(name, beta=0.4, long_weight=1.0, anchor_weight=0.0)
    check_recipe(Game.of(method), members=1)
    check_recipe(Game.of(method, trees=3), members=2)

    def distance(game: Game, p: Tensor) -> Tensor:
        """With the penalty where the game is zero-sum: it is a part of that distance everywhere."""
        return 0.4 * over(tree.occupancy(p, GAMMA), main_loss(game, "moment_gap", p))

    def on_policy_part(game: Game, p: Tensor) -> Tensor:
        return direct_losses(game, "student_text", p) + score_losses(game, p, members=1)

    game = Game.of(method)
    check_gradient(lambda p: on_policy_part(game, p), lambda p: distance(game, p), game.policy)


def test_at_the_teacher_every_value_is_zero_and_so_is_every_gradient_that_should_be():
    teacher = tree.random_logits(TREES, 1).log_softmax(-1).flatten(0, 1)
    targets = torch.zeros(len(teacher), dtype=torch.int64)
    any_f = torch.tanh(tree.random_logits(TREES, 2).flatten(0, 1))
    constant_f = any_f[:, :1].expand_as(any_f)

    def at_teacher(f: Tensor, **recipe: Any) -> tuple[Tensor, Tensor]:
        logits = teacher.clone().requires_grad_()
        both = Policies.from_logits(logits, teacher)
        losses = position_losses(RecipeConfig(**recipe), "teacher_text", both, targets, f=f)
        return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]

    for loss in ("moment_gap", *DIVERGENCES):
        value, grad = at_teacher(constant_f, loss=loss)
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)
    value, grad = at_teacher(any_f, loss="moment_gap")
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-12, rtol=0)
    assert grad.abs().max() > 0.1  # a critic that claims a difference pushes the student even at the teacher


@pytest.mark.parametrize("method", ["oracle_tv", "oracle_skl", "triangular"])
def test_the_oracles_have_no_gradient_at_the_teacher(method):
    """Their witness is zero where the policies agree, so neither value nor gradient is left, nor a penalty's."""
    bound, penalty = 1.5, 2.0
    teacher = tree.random_logits(TREES, 1).log_softmax(-1).flatten(0, 1)
    if method == "oracle_tv":
        f = sign_critic(teacher, teacher, bound)
    else:
        f = closed_form_critic(teacher, teacher, bound, penalty)
    assert not f.any()
    logits = teacher.clone().requires_grad_()
    both = Policies.from_logits(logits, teacher)
    losses = position_losses(
        RecipeConfig(beta=0.0, anchor_weight=0.0), "teacher_text", both, torch.zeros(len(f), dtype=torch.int64), f=f,
        variance_penalty=penalty if method == "triangular" else 0.0,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    for zero in (losses, grad):
        torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-12, rtol=0)


def test_the_zero_sum_student_follows_the_triangular_witness():
    """With the penalty in view its gradient is −Σ ∇π w, w = f* + (λ/4) f*²."""
    policy, teacher = (value.flatten(0, 1) for value in pair())
    penalty = 2.0
    f = closed_form_critic(policy, teacher, 1.0, penalty)
    logits = policy.clone().requires_grad_()
    both = Policies.from_logits(logits, teacher)
    recipe = RecipeConfig(beta=0.0, anchor_weight=0.0)
    targets = torch.zeros(len(f), dtype=torch.int64)
    losses = position_losses(recipe, "teacher_text", both, targets, f=f, variance_penalty=penalty)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    witness = f + penalty / 4 * f**2
    p = policy.exp()
    torch.testing.assert_close(grad, -p * (witness - (p * witness).sum(-1, keepdim=True)))
