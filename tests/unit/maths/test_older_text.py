"""Credit of text that an older policy wrote, by enumeration: the mean under that policy is the mean under
the current one, for every combination of settings that claims it.

Everything runs through :func:`learner.update.credit_step.assign_credit`. A state is a row of logits, and the
heads of both models are the identity, so the policies are any that a tree has.
"""

from __future__ import annotations

from itertools import product
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from distill.config import CreditConfig, CriticConfig, RecipeConfig
from learner.model.head import Head, LogitTransform
from learner.update.credit_step import Credit, assign_credit
from learner.update.positions import Heads, Positions
from learner.update.witness import witnesses
from tests.unit.maths import tree

GAMMA = 0.9
POLICY, TEACHER, OLDER = (tree.random_logits(1, seed)[0].log_softmax(-1) for seed in (0, 1, 2))
"""[S, V] log-probabilities of one tree."""
ORACLE = CriticConfig(form="closed_form")
TEXTS = tree.all_texts()


def credit_of(
    policy: Tensor,
    teacher: Tensor,
    behavior: Tensor,
    states: Tensor,
    tokens: Tensor,
    counted: Tensor,
    group: Tensor,
    config: CreditConfig,
    gamma: float = GAMMA,
) -> Credit:
    """``policy``, ``teacher``, ``behavior``: [S, V]; ``states``, ``tokens``, ``counted``: [B, T]."""
    row, step = counted.nonzero(as_tuple=True)
    at, chosen = states[row, step], tokens[row, step]
    positions = Positions(
        student_hidden=policy[at], teacher_hidden=teacher[at], is_student_text=torch.ones_like(row, dtype=torch.bool),
        row=row, step=step, targets=chosen, behavior_logprobs=behavior[at, chosen],
    )  # fmt: skip
    identity = Head(torch.eye(policy.shape[1], dtype=policy.dtype), LogitTransform())
    heads = Heads(identity, identity)
    witness = witnesses(ORACLE, None, heads)["student_text"]
    return assign_credit(
        positions, group, heads, witness, RecipeConfig(long_weight=1.0, gamma=gamma), config, chunk=1000
    )


def valid_settings() -> list[CreditConfig]:
    """Every combination of the settings with a finite number of values that validation accepts."""
    hints = get_type_hints(CreditConfig)
    names = ("form", "cost", "span", "normalize", "baseline", "ratio")
    found = []
    for values in product(*(get_args(hints[name]) for name in names)):
        config = CreditConfig(**dict(zip(names, values, strict=True)), ratio_max=None)
        if not list(config.violations()) and not (config.form == "exact" and config.normalize != "none"):
            found.append(config)  # the exact form never divides
    return found


def name_of(config: CreditConfig) -> str:
    return "-".join((config.form, config.cost, config.span, config.normalize, config.baseline, config.ratio))


def true_return(config: CreditConfig, text: tuple[int, ...], t: int) -> float:
    """Of token t, written out from the settings."""
    states = tree.visited(text)
    p, q = POLICY.exp(), TEACHER.exp()
    gap = ((q - p) ** 2 / (q + p)).sum(-1)  # of the optimum of the regularised game
    cost = {
        k: float(gap[states[k]] if config.cost == "moment_gap" else (POLICY - TEACHER)[states[k], text[k]])
        for k in {"own": [t], "future": range(t + 1, len(text)), "all": range(t, len(text))}[config.span]
    }
    total = sum(GAMMA ** (k - t) * c for k, c in cost.items())
    if config.normalize == "length":
        return total / max(len(cost), 1)
    if config.normalize == "discount" and cost:
        return total / sum(GAMMA ** (k - t) for k in cost)
    return total


def true_score(config: CreditConfig) -> Tensor:
    """[S, V]: E_π Σ_t R_t ∇log π(a_t|s_t) in the logits, a sum over the policy's texts."""
    total = torch.zeros_like(POLICY)
    for text, logprob in zip(tree.TEXTS, tree.text_logprobs(POLICY[None], TEXTS)[0], strict=True):
        for t, state in enumerate(tree.visited(text)):
            score = -POLICY[state].exp()
            score[text[t]] += 1
            total[state] += logprob.exp() * true_return(config, text, t) * score
    return total


def mean_score(config: CreditConfig, behavior: Tensor) -> tuple[Tensor, Tensor]:
    """[S, V]: E_μ Σ_t w_t A_t ∇log π(a_t|s_t) over groups of text of μ = ``behavior``, for the code's A_t and w_t;
    [S]: E_μ Σ_t w_t at each state. A group has one text, or two if the baseline is a mean over others."""
    members = 2 if config.baseline == "leave_one_out" else 1
    every = torch.cartesian_prod(*[torch.arange(len(tree.TEXTS))] * members).view(-1, members)
    probability = (
        tree.text_logprobs(behavior[None], TEXTS)[0].exp()[every].prod(-1).repeat_interleave(members)
    )
    states, tokens, mask = (x[every.flatten()] for x in (TEXTS.states, TEXTS.tokens, TEXTS.mask))
    group = torch.arange(len(every)).repeat_interleave(members)
    credit = credit_of(POLICY, TEACHER, behavior, states, tokens, mask, group, config)
    weight = torch.ones_like(credit.advantage) if credit.weight is None else credit.weight
    weight = weight * mask * probability[:, None] / members
    scores = torch.nn.functional.one_hot(tokens, tree.NUM_TOKENS) - POLICY.exp()[states]
    total = torch.zeros_like(POLICY)
    total.index_add_(0, states.flatten(), ((weight * credit.advantage)[..., None] * scores).flatten(0, 1))
    occupancy = torch.zeros(tree.NUM_STATES, dtype=torch.float64)
    return total, occupancy.index_add_(0, states.flatten(), weight.flatten())


def check(found: Tensor, config: CreditConfig) -> None:
    truth = true_score(config)
    if config.baseline == "whiten":  # shifted and scaled by two numbers, of which the shift is a baseline
        found, truth = (values / values.norm().clamp_min(1e-6) for values in (found, truth))
    torch.testing.assert_close(found, truth, atol=1e-9, rtol=0)


@pytest.mark.parametrize("config", [c for c in valid_settings() if c.ratio == "per_decision"], ids=name_of)
def test_per_decision_ratios_correct_older_text(config):
    """The score term and the weights of all other losses, which are those of the states the policy visits."""
    score, occupancy = mean_score(config, OLDER)
    check(score, config)
    torch.testing.assert_close(occupancy, tree.occupancy(POLICY[None], 1.0)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "config", [c for c in valid_settings() if c.ratio != "per_decision" and c.baseline == "none"], ids=name_of
)
def test_no_ratio_biases_fresh_text(config):
    check(mean_score(config, POLICY)[0], config)


@pytest.mark.parametrize("ratio", ["none", "token"])
def test_the_cheaper_ratios_do_not_correct_older_text(ratio):
    config = CreditConfig(ratio=ratio, ratio_max=None, baseline="none")
    score, truth = mean_score(config, OLDER)[0], true_score(config)
    assert (score - truth).norm() > 0.05 * truth.norm()


def two_choices(config: CreditConfig, counted: list[bool]) -> tuple[Tensor, Credit]:
    """Two independent choices between two tokens: all four texts, with their probability under μ."""
    policy, teacher, older = (
        torch.tensor([probabilities] * 2, dtype=torch.float64).log()
        for probabilities in ([0.5, 0.5], [0.3, 0.7], [0.9, 0.1])
    )
    tokens = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    states = torch.arange(2).expand(4, 2)
    mask = torch.tensor(counted).expand(4, 2)
    probability = older[states, tokens].sum(1).exp()
    credit = credit_of(policy, teacher, older, states, tokens, mask, torch.arange(4), config, gamma=1.0)
    return probability, credit


def test_a_later_tokens_own_cost_needs_its_own_ratio():
    """The cost of the second choice, on text whose first and second choices are both off."""
    settings: dict[str, Any] = {
        "form": "exact",
        "cost": "log_ratio",
        "ratio": "per_decision",
        "ratio_max": None,
    }
    probability, credit = two_choices(CreditConfig(baseline="none", **settings), [True, True])
    expected = 0.5 * torch.tensor([0.5 / 0.3, 0.5 / 0.7], dtype=torch.float64).log().sum()
    torch.testing.assert_close(probability @ credit.advantage[:, 0], expected)


def test_a_token_that_the_loss_leaves_out_has_ratio_one():
    """It neither costs anything nor stops what comes later from counting."""
    settings: dict[str, Any] = {"form": "exact", "ratio": "per_decision", "ratio_max": None}
    _, credit = two_choices(CreditConfig(baseline="none", **settings), [False, True])
    assert credit.weight is not None
    torch.testing.assert_close(credit.weight[:, 1], torch.ones(4, dtype=torch.float64))
