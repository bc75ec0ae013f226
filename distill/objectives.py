"""Divergences, moment gaps and critic losses, one value per state.

Called by ``learner.update.losses`` (with gradients) and by ``distill.evaluation`` (without). The
functions are independent of configs, modules and processes. They map tensors and plain numbers to
``[N]``, so the caller applies mask and denominator, and sums over micro-batches add up to the full batch's.

Legend: N states, V vocabulary. p = π(·|s) the policy (the student, trained), q = π*(·|s) the
teacher (fixed), m = (p + q)/2, f(s, ·) a critic's values. Policy first, teacher second, always;
both are log-probabilities in nats over the same V tokens.

A function that needs the exponentials of its first two arguments accepts them as ``policy_probs`` and
``teacher_probs`` from callers that have them: at V = 49,152 an exponential costs as much as four
products. A masked token (log-probability -inf) has probability 0 and counts 0, in the value
and in the gradient. A token that only the policy masks costs the teacher's mass times ``-LOG_FLOOR``
nats instead of infinity.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOG_FLOOR = -1e4
"""Replaces log 0 where it is multiplied by a probability, so that 0 · log 0 = 0."""

DEAD_ZONE = 1e-2
"""Least difference of two log-probabilities, in nats, at which :func:`sign_critic` is not 0. The
teacher's states are bfloat16, and their rounding must not count as a difference."""

_TINY = 1e-37
"""Least float32 denominator: 0/0 becomes 0 and no other quotient changes visibly."""


def total_variation(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """TV = ½ Σ_a |p(a) − q(a)|; 2B·TV is the supremum of the moment gap over |f| <= B."""
    return 0.5 * _difference(policy_logprobs, teacher_logprobs, policy_probs, teacher_probs).abs().sum(-1)


def forward_kl(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    *,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """KL(teacher || policy) = Σ_a q(a) (log q(a) − log p(a)). Witness: w = ρ = q/p."""
    teacher_probs = _probs(teacher_logprobs, teacher_probs)
    return _dot(teacher_probs, _finite(teacher_logprobs) - _finite(policy_logprobs))


def reverse_kl(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """KL(policy || teacher) = Σ_a p(a) (log p(a) − log q(a)). Witness: w = log ρ."""
    policy_probs = _probs(policy_logprobs, policy_probs)
    return _dot(policy_probs, _finite(policy_logprobs) - _finite(teacher_logprobs))


def generalized_jsd(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    beta: float,
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """JSD_b = b KL(q || m_b) + (1−b) KL(p || m_b), m_b = b q + (1−b) p, 0 < b < 1.

    Agarwal et al., "On-Policy Distillation of Language Models" (GKD, 2023), eq. 1, with
    P = teacher and Q = policy; also what TRL's GKD trainer computes. JSD_b / b → KL(q || p)
    as b → 0 and JSD_b / (1−b) → KL(p || q) as b → 1; the value itself vanishes at both ends,
    where TRL returns those limits instead, so this function rejects the ends.

    Raises: ValueError when beta is not inside (0, 1).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta} must be in (0, 1); use forward_kl or reverse_kl for the two limits")
    policy_probs = _probs(policy_logprobs, policy_probs)
    teacher_probs = _probs(teacher_logprobs, teacher_probs)
    mixture_logprobs = _log_mixture(policy_logprobs, teacher_logprobs, policy_probs, teacher_probs, beta)
    teacher_term = _dot(teacher_probs, _finite(teacher_logprobs) - mixture_logprobs)
    policy_term = _dot(policy_probs, _finite(policy_logprobs) - mixture_logprobs)
    return beta * teacher_term + (1 - beta) * policy_term


def skew_forward_kl(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    skew: float,
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """KL(q || α q + (1−α) p). Witness: w = (1−α) ρ / (α ρ + 1 − α).

    Ko et al., "DistiLLM" (2024), eq. 4, α = ``skew`` in [0, 1); 0 is :func:`forward_kl`.
    """
    if skew == 0:
        return forward_kl(policy_logprobs, teacher_logprobs, teacher_probs=teacher_probs)
    policy_probs = _probs(policy_logprobs, policy_probs)
    teacher_probs = _probs(teacher_logprobs, teacher_probs)
    mixture_logprobs = _log_mixture(policy_logprobs, teacher_logprobs, policy_probs, teacher_probs, skew)
    return _dot(teacher_probs, _finite(teacher_logprobs) - mixture_logprobs)


def skew_reverse_kl(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    skew: float,
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """KL(p || (1−α) q + α p). Witness: w = log((1−α) ρ + α) + α / ((1−α) ρ + α).

    Ko et al., "DistiLLM" (2024), eq. 5, α = ``skew`` in [0, 1); 0 is :func:`reverse_kl`.
    """
    if skew == 0:
        return reverse_kl(policy_logprobs, teacher_logprobs, policy_probs=policy_probs)
    policy_probs = _probs(policy_logprobs, policy_probs)
    teacher_probs = _probs(teacher_logprobs, teacher_probs)
    mixture_logprobs = _log_mixture(teacher_logprobs, policy_logprobs, teacher_probs, policy_probs, skew)
    return _dot(policy_probs, _finite(policy_logprobs) - mixture_logprobs)


def entropy(
    policy_logprobs: Float[Tensor, "N V"], *, policy_probs: Float[Tensor, "N V"] | None = None
) -> Float[Tensor, " N"]:
    """H(p) = −Σ_a p(a) log p(a)."""
    return -_dot(_probs(policy_logprobs, policy_probs), _finite(policy_logprobs))


def cross_entropy(policy_logprobs: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """−log p(y) of the text's token y."""
    return -policy_logprobs.gather(-1, targets[:, None]).squeeze(-1)


def moment_gap(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    f: Float[Tensor, "N V"],
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """g_f = Σ_a (q(a) − p(a)) f(a), exact over the vocabulary.

    For the student's loss the caller detaches f. The gradient in the policy's logits is then
    −p(a) (f(a) − E_p f), and the value is 0 at p = q for any f.
    """
    return _dot(_difference(policy_logprobs, teacher_logprobs, policy_probs, teacher_probs), f)


def critic_loss(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    f: Float[Tensor, "N V"],
    variance_penalty: float,
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """−g_f + (λ/2) Var_m f: what a critic minimises. Gradient in f: −(q−p) + λ m (f − E_m f).

    The caller detaches both policies. The negative, with f detached instead, is the student's loss
    in the zero-sum game.
    """
    policy_probs = _probs(policy_logprobs, policy_probs)
    teacher_probs = _probs(teacher_logprobs, teacher_probs)
    mean_probs = (policy_probs + teacher_probs) * 0.5
    # A constant in f changes neither term, so f is centred once. The centre needs no gradient
    # because the variance is stationary in it: Σ_a m(a) (f(a) − E_m f) = 0.
    centred = f - _dot(mean_probs, f).detach()[:, None]
    variance = _dot(mean_probs, centred.square())
    return 0.5 * variance_penalty * variance - _dot(teacher_probs - policy_probs, centred)


def critic_loss_from_optimum(
    f: Float[Tensor, "N V"],
    optimum: Float[Tensor, "N V"],
    variance_penalty: float,
    *,
    policy_probs: Float[Tensor, "N V"],
    teacher_probs: Float[Tensor, "N V"],
) -> Float[Tensor, " N"]:
    """(λ/2) (Var_m(f − f°) − Var_m f°): :func:`critic_loss` with its square completed.

    ``optimum``: f° = (2/λ) (q − p)/(q + p), where g_f = λ Cov_m(f, f°) and E_m f° = 0. The gradient in f is
    λ m (f − f° − E_m(f − f°)). At f = f° it is exactly 0, whereas the two terms of the other form cancel
    only up to rounding.
    """
    mean_probs = (policy_probs + teacher_probs) * 0.5
    difference = f - optimum
    centred = difference - _dot(mean_probs, difference).detach()[:, None]
    excess = _dot(mean_probs, centred.square()) - _dot(mean_probs, optimum.square())
    return 0.5 * variance_penalty * excess


def sampled_critic_loss(
    policy_logprobs: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    f: Float[Tensor, "N V"],
    variance_penalty: float,
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, " N"]:
    """−(f(y) − E_p f) + (λ/4) (E_p f² + f(y)²): :func:`critic_loss` from one token y ~ q a state.

    For a teacher that gives text only. It is unbiased except that it takes the penalty's centre to
    be 0. At the optimum the centre is 0 as long as λ >= 2/B, where nothing is clipped:
    E_m (q−p)/(q+p) = 0, and both losses have the same minimiser.
    """
    policy_probs = _probs(policy_logprobs, policy_probs)
    at_token = f.gather(-1, targets[:, None]).squeeze(-1)
    gap = at_token - _dot(policy_probs, f)
    return 0.25 * variance_penalty * (_dot(policy_probs, f.square()) + at_token.square()) - gap


def closed_form_critic(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    bound: float,
    variance_penalty: float,
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, "N V"]:
    """f°: the minimiser of :func:`critic_loss` among all |f| <= B.

    Stationarity is (q − p) = λ m (f − E_m f) where |f| < B, hence

        f° = clip( c + (2/λ) (q − p)/(q + p), −B, B )   with   c = E_m f°.

    At λ >= 2/B nothing is clipped and c = 0 solves it, because E_m (q−p)/(q+p) = 0; at
    λ = 2/B it is B tanh(½ log q/p). Below that c is found by bisection: E_m clip(c + ·) − c
    falls in c from >= 0 at −B to <= 0 at B. No gradient flows.

    Raises: ValueError unless bound and variance_penalty are positive.
    """
    if bound <= 0 or variance_penalty <= 0:
        raise ValueError(f"bound={bound} and variance_penalty={variance_penalty} must be positive")
    with torch.no_grad():
        policy_probs = _probs(policy_logprobs, policy_probs)
        teacher_probs = _probs(teacher_logprobs, teacher_probs)
        total = policy_probs + teacher_probs
        unclipped = (teacher_probs - policy_probs).div_(total.clamp_min(_TINY)).mul_(2 / variance_penalty)
        if variance_penalty * bound >= 2:
            return unclipped
        low = unclipped.new_full((len(unclipped), 1), -bound)
        high = -low
        for _ in range(30 if unclipped.dtype == torch.float32 else 55):
            centre = (low + high) / 2
            rises = _dot(total, (unclipped + centre).clamp_(-bound, bound))[:, None] / 2 > centre
            low, high = torch.where(rises, centre, low), torch.where(rises, high, centre)
        return (unclipped + (low + high) / 2).clamp_(-bound, bound)


def sign_critic(
    policy_logprobs: Float[Tensor, "N V"],
    teacher_logprobs: Float[Tensor, "N V"],
    bound: float,
    *,
    policy_probs: Float[Tensor, "N V"] | None = None,
    teacher_probs: Float[Tensor, "N V"] | None = None,
) -> Float[Tensor, "N V"]:
    """f = B sign(q − p), the best of all bounded critics: its moment gap is 2B·TV.

    f is 0 where |log ρ| < :data:`DEAD_ZONE`, because the sign is rounding noise there and would push
    the student away from p = q. No gradient flows.
    """
    with torch.no_grad():
        difference = _difference(policy_logprobs, teacher_logprobs, policy_probs, teacher_probs)
        apart = (_finite(teacher_logprobs) - _finite(policy_logprobs)).abs() >= DEAD_ZONE
        return difference.sign().mul_(bound).mul_(apart)


def policy_gradient(
    policy_logprobs: Float[Tensor, "N V"], targets: Int[Tensor, " N"], advantages: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """log p(a_t) · sg(A_t): its gradient is the score-function part of the gradient of L_on.

    A_t is the amount that choosing a_t adds to the moment gaps that follow, so minimising this makes
    tokens that lead to large gaps less likely. The targets must be sampled from the policy.
    """
    return -cross_entropy(policy_logprobs, targets) * advantages.detach()


def clipped_policy_gradient(
    policy_logprobs: Float[Tensor, "N V"],
    targets: Int[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    behavior_logprobs: Float[Tensor, " N"],
    clip: float,
) -> Float[Tensor, " N"]:
    """max(A r, A clip(r, 1 − ε, 1 + ε)), r = p(a)/μ(a), μ the policy that sampled, A a cost.

    Schulman et al., "Proximal policy optimization" (2017), eq. 7, for a cost instead of a reward.
    At r = 1 its gradient is that of :func:`policy_gradient`.
    """
    ratio = (-cross_entropy(policy_logprobs, targets) - behavior_logprobs).exp()
    costs = advantages.detach()
    return torch.maximum(costs * ratio, costs * ratio.clamp(1 - clip, 1 + clip))


def _probs(logprobs: Tensor, probs: Tensor | None) -> Tensor:
    return logprobs.exp() if probs is None else probs


def _difference(
    policy_logprobs: Tensor,
    teacher_logprobs: Tensor,
    policy_probs: Tensor | None,
    teacher_probs: Tensor | None,
) -> Tensor:
    return _probs(teacher_logprobs, teacher_probs) - _probs(policy_logprobs, policy_probs)


def _finite(logprobs: Tensor) -> Tensor:
    return logprobs.clamp_min(LOG_FLOOR)


def _log_mixture(
    logprobs: Tensor, other_logprobs: Tensor, probs: Tensor, other_probs: Tensor, weight: float
) -> Tensor:
    """log((1−w) a + w b), 0 < w < 1, from the logarithms of a and b where the sum underflows.

    Only blocks that contain such a token (in float32 both below e^−87) cost the second pass.
    """
    mixture = torch.lerp(probs, other_probs, weight)
    underflow = mixture < torch.finfo(mixture.dtype).tiny
    if not underflow.any():
        return mixture.log()
    in_logs = torch.logaddexp(
        _finite(logprobs) + math.log1p(-weight), _finite(other_logprobs) + math.log(weight)
    )
    return torch.where(underflow, in_logs, mixture.masked_fill(underflow, 1.0).log())


def _dot(weights: Tensor, values: Tensor) -> Tensor:
    return torch.linalg.vecdot(weights, values)
