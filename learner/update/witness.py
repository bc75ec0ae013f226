"""The witness of a moment gap: the f that the student plays against, a constant of the student step.

``critic.form`` selects it: the two learned critics, or the optimum of an unlimited critic
(``closed_form``, ``sign``), which needs no training and is a function of the two policies.

Legend: N positions (response tokens), D features, V vocabulary (the common prefix of both models').
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from distill.config import CriticConfig
from distill.objectives import closed_form_critic, sign_critic
from learner.batch import TEXTS, Text
from learner.model.chunked import ChunkedLogits
from learner.model.head import Head, LogitTransform
from learner.update.critics import Critic, CriticPair
from learner.update.positions import Heads, Policies

Values = Callable[[slice, Policies, Tensor], Tensor]
"""(positions, both policies there, their log-ratio [n, V]) -> f [n, V], without gradient."""


@runtime_checkable
class Witness(Protocol):
    """f on one of the two texts."""

    def at(
        self, teacher_hidden: Float[Tensor, "N Dt"], student_hidden: Float[Tensor, "N Ds"], chunk: int
    ) -> Values:
        """Its values at some positions; call them in the order of :func:`learner.model.chunked.chunked_loss`."""
        ...


class LearnedWitness:
    """A learned critic, fixed; its table is computed once for all packs."""

    @torch.no_grad()
    def __init__(self, critic: Critic, heads: Heads) -> None:
        self._critic = critic
        self._table = Head(critic.table(heads.teacher, heads.student), LogitTransform())

    @torch.no_grad()
    def at(self, teacher_hidden: Tensor, student_hidden: Tensor, chunk: int) -> Values:
        coefficients = self._critic.coefficients(teacher_hidden, student_hidden)
        bilinear = ChunkedLogits(self._table, coefficients, chunk)

        @torch.no_grad()
        def values(where: slice, both: Policies, log_ratio: Tensor) -> Tensor:
            return self._critic.activate(bilinear(where), log_ratio)

        return values


class FixedWitness:
    """A function of both policies."""

    def __init__(self, f: Callable[[Policies], Tensor]) -> None:
        self._f = f

    def at(self, teacher_hidden: Tensor, student_hidden: Tensor, chunk: int) -> Values:
        return lambda where, both, log_ratio: self._f(both)


def witnesses(config: CriticConfig, critics: CriticPair | None, heads: Heads) -> dict[Text, Witness]:
    """The witness of each text, with the critics in their present state."""
    if config.form == "learned":
        if critics is None:
            raise ValueError("critic.form=learned needs critics")
        return {text: LearnedWitness(critics.witness(text), heads) for text in TEXTS}
    fixed = FixedWitness(_closed_form(config) if config.form == "closed_form" else _sign(config))
    return dict.fromkeys(TEXTS, fixed)


def _closed_form(config: CriticConfig) -> Callable[[Policies], Tensor]:
    return lambda both: closed_form_critic(*both.pair, config.bound, config.penalty, **both.probs)


def _sign(config: CriticConfig) -> Callable[[Policies], Tensor]:
    return lambda both: sign_critic(*both.pair, config.bound, **both.probs)
