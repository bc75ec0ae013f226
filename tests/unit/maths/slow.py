"""The student's loss from the equations: row by row, token by token, without packs or chunks.

Returned as a tensor whose gradient autograd takes, so it holds only what shall have a gradient:
critics, credit and ratios are plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.config import MethodConfig
from distill.objectives import DEAD_ZONE, closed_form_critic
from learner.model.head import Head
from learner.update.critics import CriticPair
from learner.update.positions import Heads
from tests.unit.maths.batches import Row, TinyStudent


def slow_loss(
    method: MethodConfig, rows: Sequence[Row], student: TinyStudent, teacher: Head, critics: CriticPair | None
) -> Tensor:
    recipe, exact = method.recipe, method.credit.form == "exact"
    both_texts = recipe.student_text == "every_update" and recipe.teacher_text != "none"
    text_weight = {False: 1 - recipe.beta, True: recipe.beta} if both_texts else {False: 1.0, True: 1.0}
    of_source = {on: [row for row in rows if row.is_student_text == on] for on in (False, True)}
    counts = {
        on: len(members) if exact else sum(sum(row.counted) for row in members)
        for on, members in of_source.items()
    }
    each = [_Row(method, row, student, teacher, critics) for row in rows]
    total = torch.zeros((), dtype=torch.float64)
    for number, (row, values) in enumerate(zip(rows, each, strict=True)):
        for t in range(len(row.response)):
            if not row.counted[t]:
                continue
            loss = torch.zeros((), dtype=torch.float64)
            if recipe.loss_weight:
                loss = loss + text_weight[row.is_student_text] * recipe.loss_weight * values.main(t)
            if row.is_student_text and recipe.long_weight:
                advantage = _advantage(method, rows, each, number, t)
                weight = text_weight[True] * recipe.long_weight
                loss = loss + weight * values.score(t, advantage)
            if not row.is_student_text:
                loss = loss + recipe.anchor_weight * values.divergence(recipe.anchor, t)
                loss = loss - recipe.lm_weight * values.log_p[t, row.response[t]]
            weight = recipe.gamma**t if exact else 1.0
            if row.is_student_text and method.credit.ratio == "per_decision":
                weight *= math.prod(values.ratio[:t])
            total = total + weight * loss / counts[row.is_student_text]
    return total


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


class _Row:
    """One row's distributions, witness and costs."""

    def __init__(
        self, method: MethodConfig, row: Row, student: TinyStudent, teacher: Head, critics: CriticPair | None
    ) -> None:
        self.method, self.row = method, row
        tokens = torch.tensor(row.prompt + row.response[:-1])
        states = torch.tanh(student.embedding[tokens] + student.position[: len(tokens)])
        hidden = states[len(row.prompt) - 1 :]
        self.log_p = (hidden @ student.head_weight.T).log_softmax(-1)
        self.log_q = teacher.logits(row.hidden).log_softmax(-1)
        self.p, self.q = self.log_p.exp(), self.log_q.exp()
        p, q = self.p.detach(), self.q
        config = method.critic
        if config.form == "sign":
            apart = (self.log_q - self.log_p.detach()).abs() >= DEAD_ZONE
            self.f = config.bound * (q - p).sign() * apart
        elif config.form == "closed_form":
            self.f = closed_form_critic(self.log_p.detach(), self.log_q, config.bound, config.penalty)
        elif critics is not None:
            critic = critics.witness("student_text" if row.is_student_text else "teacher_text")
            with torch.no_grad():
                heads = Heads.of(student, teacher)
                table = critic.table(heads.teacher, heads.student)
                bilinear = critic.coefficients(row.hidden, hidden) @ table.T
                self.f = critic.activate(bilinear, self.log_q - self.log_p)
        credit = method.credit
        self.ratio, self.cost = [], []
        for t, token in enumerate(row.response):
            log_p, log_q = float(self.log_p[t, token].detach()), float(self.log_q[t, token])
            ratio = math.exp(log_p - float(row.behavior[t])) if row.counted[t] else 1.0
            self.ratio.append(ratio if credit.ratio_max is None else min(ratio, credit.ratio_max))
            if credit.cost == "moment_gap":
                cost = float(self.gap(p[t], q[t], self.f[t])) if hasattr(self, "f") else 0.0
            else:
                cost = log_p - log_q
            cost /= credit.cost_scale
            limit = math.inf if credit.cost_max is None else credit.cost_max
            self.cost.append(max(-limit, min(limit, cost)))

    def main(self, t: int) -> Tensor:
        recipe = self.method.recipe
        loss = (
            recipe.student_text_loss if self.row.is_student_text and recipe.student_text_loss else recipe.loss
        )
        if loss != "moment_gap":
            return self.divergence(loss, t)
        return self.gap(self.p[t], self.q[t], self.f[t])

    def gap(self, p: Tensor, q: Tensor, f: Tensor) -> Tensor:
        gap = ((q - p) * f).sum()
        critic = self.method.critic
        if critic.zero_sum:
            m = (p + q) / 2
            gap = gap - critic.penalty / 2 * ((m * f**2).sum() - (m * f).sum() ** 2)
        return gap

    def divergence(self, loss: str, t: int) -> Tensor:
        recipe, p, q = self.method.recipe, self.p[t], self.q[t]
        if loss == "forward_kl":
            return _kl(q, p)
        if loss == "reverse_kl":
            return _kl(p, q)
        if loss == "generalized_jsd":
            m = recipe.jsd_beta * q + (1 - recipe.jsd_beta) * p
            return recipe.jsd_beta * _kl(q, m) + (1 - recipe.jsd_beta) * _kl(p, m)
        if loss == "skew_forward_kl":
            return _kl(q, recipe.skew * q + (1 - recipe.skew) * p)
        assert loss == "skew_reverse_kl"
        return _kl(p, (1 - recipe.skew) * q + recipe.skew * p)

    def score(self, t: int, advantage: float) -> Tensor:
        credit, log_p = self.method.credit, self.log_p[t, self.row.response[t]]
        if credit.ppo_clip is not None:
            ratio = (log_p - self.row.behavior[t]).exp()
            clipped = ratio.clamp(1 - credit.ppo_clip, 1 + credit.ppo_clip)
            return torch.maximum(advantage * ratio, advantage * clipped)
        return log_p * advantage * (1.0 if credit.ratio == "none" else self.ratio[t])

    def to_come(self, t: int) -> float:
        """The return of token t; 0 behind the row's end and where the loss leaves the token out."""
        credit, length = self.method.credit, len(self.row.response)
        if t >= length or not self.row.counted[t]:
            return 0.0
        if credit.ratio != "per_decision":
            return self._return(t, length - 1)
        total = 0.0
        for last in range(t, length):  # what token `last` adds, times the ratios of what that depends on
            depends_on = self.ratio[t + 1 : last if credit.cost == "moment_gap" else last + 1]
            total += math.prod(depends_on) * (self._return(t, last) - self._return(t, last - 1))
        return total

    def _return(self, t: int, last: int) -> float:
        """The return of token t if token ``last`` were the row's last."""
        credit, gamma, length = self.method.credit, self.method.recipe.gamma, len(self.row.response)
        span = {"own": [t], "future": range(t + 1, length), "all": range(t, length)}[credit.span]
        span = [k for k in span if k <= last and self.row.counted[k]]
        total = sum(gamma ** (k - t) * self.cost[k] for k in span)
        if credit.form == "exact" or credit.normalize == "none" or not span:
            return total
        if credit.normalize == "length":
            return total / len(span)
        return total / sum(gamma ** (k - t) for k in span)


def _advantage(method: MethodConfig, rows: Sequence[Row], each: Sequence[_Row], number: int, t: int) -> float:
    own = each[number].to_come(t)
    if method.credit.baseline == "none":
        return own
    if method.credit.baseline == "whiten":
        everything = [
            values.to_come(k)
            for row, values in zip(rows, each, strict=True)
            if row.is_student_text
            for k in range(len(row.response))
            if row.counted[k]
        ]
        mean = sum(everything) / len(everything)
        variance = sum((value - mean) ** 2 for value in everything) / len(everything)
        return (own - mean) / math.sqrt(variance + 1e-8)
    others = [
        values
        for i, (row, values) in enumerate(zip(rows, each, strict=True))
        if i != number and row.group == rows[number].group
    ]
    return own - (sum(other.to_come(t) for other in others) / len(others) if others else 0.0)
