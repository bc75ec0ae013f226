"""The critics' form, start, gradient and state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.config import CriticConfig
from distill.errors import Diverged
from distill.objectives import closed_form_critic
from learner.model.head import Head, LogitTransform
from learner.update.critics import CriticPair
from tests.unit.maths.batches import SIZES, STUDENT_SIZE, TEACHER_SIZE, TinyStudent, critic_pair, teacher_head

N = 6


def inputs() -> tuple[Tensor, Tensor, Head, Head, Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher_hidden, student_hidden = (
        torch.randn(N, size, generator=generator, dtype=torch.float64)
        for size in (TEACHER_SIZE, STUDENT_SIZE)
    )
    teacher, student = teacher_head(), Head(TinyStudent().head_weight.detach(), LogitTransform())
    log_ratio = teacher.logits(teacher_hidden).log_softmax(-1) - student.logits(student_hidden).log_softmax(
        -1
    )
    return teacher_hidden, student_hidden, teacher, student, log_ratio


def values(critic, teacher_hidden, student_hidden, teacher, student, log_ratio) -> Tensor:
    bilinear = critic.coefficients(teacher_hidden, student_hidden) @ critic.table(teacher, student).T
    return critic.activate(bilinear, log_ratio)


def test_a_ratio_aware_critic_starts_at_the_optimum_of_the_regularised_game():
    for bound in (1.0, 2.5):
        config = CriticConfig(bound=bound)
        *models, log_ratio = inputs()
        f = values(critic_pair(config)["teacher_text"], *models, log_ratio)
        torch.testing.assert_close(f, bound * torch.tanh(log_ratio / 2))
        policy = Head(TinyStudent().head_weight.detach(), LogitTransform()).logits(models[1]).log_softmax(-1)
        best = closed_form_critic(policy, policy + log_ratio, bound, config.penalty)
        torch.testing.assert_close(f, best)


@pytest.mark.parametrize("features", ["teacher", "both"])
def test_other_critics_start_at_zero(features):
    assert not values(critic_pair(CriticConfig(features=features))["student_text"], *inputs()).any()


@pytest.mark.parametrize("features", ["teacher", "both", "ratio"])
def test_the_form_is_the_documented_one(features):
    """Token by token, from the equation."""
    config = CriticConfig(features=features, rank=3, bound=1.5)
    critic = critic_pair(config, shake=0.3)["student_text"]
    teacher_hidden, student_hidden, teacher, student, log_ratio = inputs()
    f = values(critic, teacher_hidden, student_hidden, teacher, student, log_ratio)

    def bilinear(part, hidden: Tensor, row: Tensor) -> Tensor:
        normalised = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
        u = part.w2 @ torch.nn.functional.gelu(part.w1 @ normalised + part.b1)
        projected = part.projection @ (row / row.norm())
        return u @ projected / math.sqrt(3) + part.constant @ projected

    for n in range(N):
        for a in range(teacher.num_tokens):
            x = bilinear(critic.teacher, teacher_hidden[n], teacher.weight[a])
            if features == "both":
                x = x + bilinear(critic.student, student_hidden[n], student.weight[a])
            if features == "ratio":
                x = x + critic.ratio_weight * log_ratio[n, a]
            torch.testing.assert_close(f[n, a], 1.5 * torch.tanh(x), atol=1e-7, rtol=1e-7)
    assert (f.abs() <= 1.5).all()


def test_the_dense_form():
    critic = critic_pair(CriticConfig(features="ratio", rank=None, bound=1.5), shake=0.3)["student_text"]
    teacher_hidden, student_hidden, teacher, student, log_ratio = inputs()
    f = values(critic, teacher_hidden, student_hidden, teacher, student, log_ratio)
    for n in range(N):
        hidden = teacher_hidden[n]
        normalised = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
        for a in range(teacher.num_tokens):
            row, constant = critic.teacher.rows[a, :-1], critic.teacher.rows[a, -1]
            x = row @ normalised / math.sqrt(TEACHER_SIZE) + constant
            x = x + critic.ratio_weight * log_ratio[n, a]
            torch.testing.assert_close(f[n, a], 1.5 * torch.tanh(x), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("rank", [4, None])
def test_a_random_start_is_of_the_size_of_a_trained_critic(rank):
    config = CriticConfig(features="teacher", rank=rank, start="random")
    f = values(critic_pair(config)["student_text"], *inputs())
    assert 0.2 < f.detach().abs().mean() < 0.95


def test_the_activations_gradient():
    critic = critic_pair(CriticConfig(bound=1.5))["student_text"]
    generator = torch.Generator().manual_seed(1)
    x, log_ratio = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: critic.activate(x, log_ratio), x)
    loss = critic.activate(x, log_ratio).sum()
    (grad,) = torch.autograd.grad(loss, critic.ratio_weight)
    slope = 1.5 / torch.cosh(x + 0.5 * log_ratio) ** 2
    torch.testing.assert_close(grad, (slope * log_ratio).sum().detach())


def pair(seed: int = 0, **config) -> CriticPair:
    return CriticPair(CriticConfig(**config), *SIZES, seed)


def same(left: CriticPair, right: CriticPair) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def loss_of(pair: CriticPair) -> Tensor:
    return sum((p.square().sum() + p.sum() for p in pair.parameters()), torch.zeros(()))


def test_the_seed_decides_the_start_and_the_two_differ():
    assert same(pair(0), pair(0)) and not same(pair(0), pair(1))
    assert not torch.equal(
        pair()["teacher_text"].teacher.projection, pair()["student_text"].teacher.projection
    )


def test_the_running_mean_of_the_critics():
    critics = pair(0, ema=0.75)
    means = [value.detach().clone() for value in critics["student_text"].parameters()]
    for _ in range(3):
        critics.zero_grad()
        loss_of(critics).backward()
        critics.step()
        for mean, value in zip(means, critics["student_text"].parameters(), strict=True):
            mean += 0.25 * (value.detach() - mean)
    for mean, value in zip(means, critics.witness("student_text").parameters(), strict=True):
        torch.testing.assert_close(value, mean)
    assert pair(0).witness("student_text") is not critics.witness("student_text")
    assert (newest := pair(0)).witness("student_text") is newest["student_text"]


@pytest.mark.parametrize("config", [{}, {"ema": 0.9}, {"rank": None}])
def test_state_goes_through_a_checkpoint(config):
    trained = pair(0, **config)
    for _ in range(2):
        trained.zero_grad()
        loss_of(trained).backward()
        trained.step()
    restored = pair(1, **config)
    restored.load_state_dict({name: value.clone() for name, value in trained.state_dict().items()})
    for each in (trained, restored):
        each.zero_grad()
        loss_of(each).backward()
        each.step()
    assert same(trained, restored)
    for a, b in zip(
        trained.witness("student_text").parameters(),
        restored.witness("student_text").parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_steps_clip_each_critic_and_refuse_what_is_not_finite():
    critics = pair(max_grad_norm=0.5)
    before = [p.clone() for p in critics["student_text"].parameters()]
    (1e3 * critics["teacher_text"].teacher.constant.sum()).backward()
    norm = critics.step()
    assert norm > 1e3
    grad = critics["teacher_text"].teacher.constant.grad
    torch.testing.assert_close(grad.norm(), torch.tensor(0.5), atol=1e-4, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, critics["student_text"].parameters(), strict=True))
    critics.zero_grad()
    (
        1e3 * critics["teacher_text"].teacher.constant.sum()
        + 1e-2 * critics["student_text"].teacher.constant.sum()
    ).backward()
    small = critics["student_text"].teacher.constant.grad.clone()
    critics.step()
    torch.testing.assert_close(
        critics["teacher_text"].teacher.constant.grad.norm(), torch.tensor(0.5), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        critics["student_text"].teacher.constant.grad, small
    )  # a quiet one keeps its step
    off = [p.clone() for p in critics["teacher_text"].parameters()]
    critics.zero_grad()
    (critics["teacher_text"].teacher.constant.sum() * torch.inf).backward()
    with pytest.raises(
        Diverged, match=r"^norm of the critics' gradient=inf must be finite; lower critic\.learning_rate"
    ):
        critics.step()
    assert all(torch.equal(a, b) for a, b in zip(off, critics["teacher_text"].parameters(), strict=True))


def test_adam_without_momentum():
    """Adam(0, 0.9), the method's: a critic follows the student of now."""
    assert pair().optimizer.defaults["betas"] == (0.0, 0.9)
