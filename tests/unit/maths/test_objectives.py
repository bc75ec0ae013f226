"""Divergences and critic losses against slow references, at the edges, and in their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill import objectives

N, V = 5, 9


def logprobs(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(N, V, generator=generator, dtype=torch.float64)).to(dtype).log_softmax(-1)


P, Q = logprobs(0), logprobs(1)
VALUES = torch.tanh(logprobs(2) + 2)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(p[a] * (math.log(p[a]) - math.log(q[a])) for a in range(len(p)) if p[a] > 0)


def reference(name: str, p: np.ndarray, q: np.ndarray, f: np.ndarray) -> float:
    """One state, written from the definitions. p: policy, q: teacher."""
    if name == "total_variation":
        return sum(abs(p[a] - q[a]) for a in range(V)) / 2
    if name == "forward_kl":
        return kl(q, p)
    if name == "reverse_kl":
        return kl(p, q)
    if name == "generalized_jsd":
        m = 0.3 * q + 0.7 * p
        return 0.3 * kl(q, m) + 0.7 * kl(p, m)
    if name == "skew_forward_kl":
        return kl(q, 0.1 * q + 0.9 * p)
    if name == "skew_reverse_kl":
        return kl(p, 0.9 * q + 0.1 * p)
    if name == "entropy":
        return -sum(p[a] * math.log(p[a]) for a in range(V))
    if name == "moment_gap":
        return sum((q[a] - p[a]) * f[a] for a in range(V))
    m = (p + q) / 2
    mean = sum(m[a] * f[a] for a in range(V))
    variance = sum(m[a] * (f[a] - mean) ** 2 for a in range(V))
    return -sum((q[a] - p[a]) * f[a] for a in range(V)) + 0.75 * variance  # λ = 1.5


FUNCTIONS = {
    "total_variation": lambda p, q, f, **probs: objectives.total_variation(p, q, **probs),
    "forward_kl": lambda p, q, f, **probs: objectives.forward_kl(
        p, q, **{k: v for k, v in probs.items() if k == "teacher_probs"}
    ),
    "reverse_kl": lambda p, q, f, **probs: objectives.reverse_kl(
        p, q, **{k: v for k, v in probs.items() if k == "policy_probs"}
    ),
    "generalized_jsd": lambda p, q, f, **probs: objectives.generalized_jsd(p, q, 0.3, **probs),
    "skew_forward_kl": lambda p, q, f, **probs: objectives.skew_forward_kl(p, q, 0.1, **probs),
    "skew_reverse_kl": lambda p, q, f, **probs: objectives.skew_reverse_kl(p, q, 0.1, **probs),
    "entropy": lambda p, q, f, **probs: objectives.entropy(
        p, **{k: v for k, v in probs.items() if k == "policy_probs"}
    ),
    "moment_gap": lambda p, q, f, **probs: objectives.moment_gap(p, q, f, **probs),
    "critic_loss": lambda p, q, f, **probs: objectives.critic_loss(p, q, f, 1.5, **probs),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given", [False, True])
def test_values_are_the_definitions(name, given):
    probs = {"policy_probs": P.exp(), "teacher_probs": Q.exp()} if given else {}
    expected = [reference(name, *(x[n].numpy() for x in (P.exp(), Q.exp(), VALUES))) for n in range(N)]
    torch.testing.assert_close(FUNCTIONS[name](P, Q, VALUES, **probs), torch.tensor(expected).double())


OTHER_FUNCTIONS = {
    "sampled_critic_loss": lambda p, q, f, **probs: objectives.sampled_critic_loss(
        p, torch.zeros(N, dtype=torch.long), f, 1.5, **{k: v for k, v in probs.items() if k == "policy_probs"}
    ),
    "closed_form_critic": lambda p, q, f, **probs: objectives.closed_form_critic(p, q, 1.0, 2.0, **probs),
    "sign_critic": lambda p, q, f, **probs: objectives.sign_critic(p, q, 1.0, **probs),
}


@pytest.mark.parametrize("name", [*FUNCTIONS, *OTHER_FUNCTIONS])
@pytest.mark.parametrize("which", ["policy_probs", "teacher_probs"])
def test_given_probabilities_are_not_computed_again(name, which):
    """Each saves a pass over the vocabulary; wrong ones must therefore show."""
    function = (FUNCTIONS | OTHER_FUNCTIONS)[name]
    unused = {("forward_kl", "policy_probs"), ("reverse_kl", "teacher_probs"), ("entropy", "teacher_probs"),
              ("sampled_critic_loss", "teacher_probs")}  # fmt: skip
    given = {"policy_probs": P.exp(), "teacher_probs": Q.exp()}
    wrong = given | {which: given[which].flip(-1)}
    same = torch.equal(function(P, Q, VALUES, **given), function(P, Q, VALUES, **wrong))
    assert same == ((name, which) in unused)


@pytest.mark.parametrize(("bound", "penalty"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_a_critic_without_bound_or_penalty_has_no_closed_form(bound, penalty):
    with pytest.raises(ValueError, match=f"bound={bound} and variance_penalty={penalty} must be positive"):
        objectives.closed_form_critic(P, Q, bound, penalty)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_in_the_policys_logits(name):
    logits = P.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: FUNCTIONS[name](x.log_softmax(-1), Q, VALUES), logits)


def test_gradient_of_the_critics_loss_in_its_values():
    f = VALUES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objectives.critic_loss(P, Q, x, 1.5), f)


def test_the_critics_loss_from_tokens_is_the_one_from_probabilities_on_average():
    """Over y ~ q; but for the penalty's centre, which is 0 at the optimum."""
    penalty = 1.5

    def expected(f: Tensor) -> Tensor:
        losses = [objectives.sampled_critic_loss(P, torch.full((N,), y), f, penalty) for y in range(V)]
        return (Q.exp() * torch.stack(losses, dim=1)).sum(-1)

    mean = (P.exp() + Q.exp()) / 2
    centre = (mean * VALUES).sum(-1)
    uncentred = objectives.critic_loss(P, Q, VALUES, penalty) + penalty / 2 * centre**2
    torch.testing.assert_close(expected(VALUES), uncentred)
    best = objectives.closed_form_critic(P, Q, 2 / penalty, penalty).requires_grad_()
    (grad,) = torch.autograd.grad(expected(best).sum(), best)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("masked", ["both", "policy", "teacher"])
def test_a_masked_tail_counts_nothing(name, masked):
    """Same value and gradient as without the tail; no NaN where only one policy masks it."""

    def with_tail(seed: int, mask: bool) -> Tensor:
        tail = torch.full((N, 3), -torch.inf if mask else -2.0, dtype=torch.float64)
        return torch.cat([2 * logprobs(seed), tail], dim=1)

    policy = with_tail(0, masked in ("both", "policy")).requires_grad_()
    teacher = with_tail(1, masked in ("both", "teacher")).log_softmax(-1)
    f = torch.cat([VALUES, VALUES[:, :3]], dim=1)
    losses = FUNCTIONS[name](policy.log_softmax(-1), teacher, f)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all()
    assert grad.isfinite().all()
    if masked == "both":
        short = (2 * logprobs(0)).requires_grad_()
        expected = FUNCTIONS[name](short.log_softmax(-1), (2 * logprobs(1)).log_softmax(-1), VALUES)
        (expected_grad,) = torch.autograd.grad(expected.sum(), short)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(grad[:, :V], expected_grad)
        assert not grad[:, V:].any()
        best = objectives.closed_form_critic(policy.log_softmax(-1), teacher, 1.0, 2.0)
        assert best.isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_jsd_equals_trls(beta, monkeypatch):
    """Value and gradient of the loss of TRL's GKD trainer, from the package itself."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    logits, their_logits = (logprobs(0).requires_grad_() for _ in range(2))
    losses = objectives.generalized_jsd(logits.log_softmax(-1), Q, beta)
    theirs = GKDTrainer.generalized_jsd_loss(their_logits, Q, beta=beta, reduction="none").sum(-1)
    torch.testing.assert_close(losses, theirs)
    grads = [
        torch.autograd.grad(loss.sum(), at)[0] for loss, at in ((losses, logits), (theirs, their_logits))
    ]
    torch.testing.assert_close(*grads)


def test_the_jsds_limits_are_the_two_divergences():
    small = 1e-6
    jsd = objectives.generalized_jsd
    torch.testing.assert_close(jsd(P, Q, small) / small, objectives.forward_kl(P, Q), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        jsd(P, Q, 1 - small) / small, objectives.reverse_kl(P, Q), atol=1e-4, rtol=1e-3
    )
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match="use forward_kl or reverse_kl"):
            jsd(P, Q, end)


def test_witnesses():
    """Every gradient is −Σ_a ∇π(a) w(a) with the documented witness w of ρ = π*/π."""
    rho = (Q - P).exp()
    witnesses = {
        "forward_kl": rho,
        "reverse_kl": rho.log(),
        "generalized_jsd": 0.7 * (0.3 * rho + 0.7).log(),
        "skew_forward_kl": 0.9 * rho / (0.1 * rho + 0.9),
        "skew_reverse_kl": (0.9 * rho + 0.1).log() + 0.1 / (0.9 * rho + 0.1),
        "moment_gap": VALUES,
    }
    for name, witness in witnesses.items():
        logits = P.clone().requires_grad_()
        (grad,) = torch.autograd.grad(FUNCTIONS[name](logits.log_softmax(-1), Q, VALUES).sum(), logits)
        centred = witness - (P.exp() * witness).sum(-1, keepdim=True)
        torch.testing.assert_close(grad, -P.exp() * centred)


def test_cross_entropy_and_policy_gradient():
    targets = torch.tensor([0, 3, 8, 1, 1])
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    expected = [-P[n, targets[n]] for n in range(N)]
    torch.testing.assert_close(objectives.cross_entropy(P, targets), torch.stack(expected))
    logits = P.clone().requires_grad_()
    loss = objectives.policy_gradient(logits.log_softmax(-1), targets, advantages).sum()
    grad, credit_grad = torch.autograd.grad(loss, [logits, advantages], allow_unused=True)
    assert credit_grad is None
    onehot = F.one_hot(targets, V).double()
    torch.testing.assert_close(grad, advantages.detach()[:, None] * (onehot - P.exp()))
    assert grad[0, targets[0]] > 0  # descent makes a token before larger gaps less likely


def test_the_skew_kls_without_skew_are_the_plain_ones():
    torch.testing.assert_close(objectives.skew_forward_kl(P, Q, 0.0), objectives.forward_kl(P, Q))
    torch.testing.assert_close(objectives.skew_reverse_kl(P, Q, 0.0), objectives.reverse_kl(P, Q))


def test_the_sign_critic_is_the_best_of_all_bounded_ones():
    f = objectives.sign_critic(P, Q, 1.5)
    torch.testing.assert_close(objectives.moment_gap(P, Q, f), 3 * objectives.total_variation(P, Q))


def test_the_sign_critic_ignores_bfloat16_rounding():
    """A student that equals the teacher sees the teacher's states in bfloat16 beside its own."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 512, generator=generator), torch.randn(1000, 512, generator=generator)
    logits = [
        (states @ weight.T / 512**0.5 * 3).log_softmax(-1) for states in (hidden, hidden.bfloat16().float())
    ]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3
    assert float(objectives.sign_critic(*logits, 1.0).abs().mean()) < 0.1


def test_ppos_clip():
    targets = torch.tensor([0, 3, 8, 1, 1])
    costs = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0], dtype=torch.float64)
    sampled = P.gather(1, targets[:, None]).squeeze(1)
    behavior = sampled - torch.tensor([0.0, 0.1, 0.5, 0.5, -0.5], dtype=torch.float64)
    logits = P.clone().requires_grad_()
    losses = objectives.clipped_policy_gradient(logits.log_softmax(-1), targets, costs, behavior, 0.2)
    for n, (cost, ratio) in enumerate(zip(costs, (sampled - behavior).exp(), strict=True)):
        expected = max(cost * ratio, cost * min(max(ratio, 0.8), 1.2))
        assert float(losses[n].detach()) == pytest.approx(float(expected))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert not grad[3:].any()  # a good token much likelier by now, a bad one much rarer: no further
    assert grad[:3].any(dim=1).all()  # pessimism: a bad one much likelier still is pushed
    plain = objectives.policy_gradient(logits.log_softmax(-1), targets, costs)
    (plain_grad,) = torch.autograd.grad(plain.sum(), logits)
    torch.testing.assert_close(grad[0], plain_grad[0])  # at ratio 1


def test_large_vocabularies_in_float32_are_accurate():
    generator = torch.Generator().manual_seed(0)
    p, q = (4 * torch.randn(2, 4, 50_000, generator=generator, dtype=torch.float64)).log_softmax(-1)
    for name in set(FUNCTIONS) - {"moment_gap", "critic_loss"}:
        exact = FUNCTIONS[name](p, q, None)
        torch.testing.assert_close(
            FUNCTIONS[name](p.float(), q.float(), None).double(), exact, atol=2e-5, rtol=2e-5
        )
        same = FUNCTIONS[name](p.float(), p.float(), None)
        if name != "entropy":
            assert same.abs().max() < 1e-6
