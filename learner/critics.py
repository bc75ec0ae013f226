"""The two critics: bounded action-value functions over the whole vocabulary.

    f(s, a) = B · tanh( u(h)·(P e_a)/√r + c·(P e_a)  [+ the same from the student]  [+ s · log ρ(s, a)] )
    u(h) = W2 gelu(W1 norm(h))

h is a model's state before the token, e_a the row of that model's unembedding for token a,
normalised, ρ = π*/π. ``features`` says which terms there are: ``teacher`` the first, ``both``
the first from either model, ``ratio`` the first from the teacher and the log-ratio. W2 and c
start at 0, so a critic starts at f = 0, and a ratio-aware one (s = ½) at
tanh(½ log ρ) = (π* − π)/(π* + π), the optimum of the regularised game at λ = 2/B.

The argument of the tanh is a head of rank r: (u/√r + c) · (P e_a). So it is computed, and
differentiated, as logits are (:func:`learner.vocabulary.chunked_loss`), from *coefficients*
[N, R] and a *table* [V, R] that is made once per critic step. Everything is float32. No
gradient reaches a backbone or an unembedding.

Legend: N states, D features, V vocabulary, R coefficients (r, or 2r with both).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.config import CriticConfig
from learner.optimizer import load_optimizer_tensors, optimizer_tensors
from learner.vocabulary import Head

Features = Literal["ratio", "teacher", "both"]
Source = Literal["off", "on"]
SOURCES: tuple[Source, Source] = ("off", "on")
"""Off-policy text (teacher samples or references), on-policy text (the student's)."""

_MIN_WIDTH = 128


class _Bilinear(nn.Module):
    """u(h)·(P e_a)/√r + c·(P e_a) for the states and the unembedding of one model."""

    def __init__(self, hidden_size: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        width = max(_MIN_WIDTH, 2 * rank)
        self.w1 = nn.Parameter(torch.randn(width, hidden_size, generator=generator) / math.sqrt(hidden_size))
        self.b1 = nn.Parameter(torch.zeros(width))
        self.w2 = nn.Parameter(torch.zeros(rank, width))
        self.constant = nn.Parameter(torch.zeros(rank))
        self.projection = nn.Parameter(torch.randn(rank, hidden_size, generator=generator))

    def coefficients(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N r"]:
        hidden = hidden.detach().to(self.w1.dtype)
        normalised = F.layer_norm(hidden, hidden.shape[-1:])
        u = F.gelu(normalised @ self.w1.T + self.b1) @ self.w2.T
        return u / math.sqrt(len(self.constant)) + self.constant

    def table(self, head: Head) -> Float[Tensor, "V r"]:
        weight = head.weight.detach()
        projected = weight @ self.projection.to(weight.dtype).T
        return projected.to(self.projection.dtype) / head.row_norms[:, None]


class Critic(nn.Module):
    """One critic. Start values come from the generator alone."""

    def __init__(
        self,
        features: Features,
        teacher_size: int,
        student_size: int,
        generator: torch.Generator,
        *,
        rank: int = 64,
        bound: float = 1.0,
        ratio_start: float = 0.5,
    ) -> None:
        super().__init__()
        self.bound = bound
        self.teacher = _Bilinear(teacher_size, rank, generator)
        self.student = _Bilinear(student_size, rank, generator) if features == "both" else None
        self.ratio_weight = nn.Parameter(torch.tensor(float(ratio_start))) if features == "ratio" else None

    def coefficients(
        self, teacher_hidden: Float[Tensor, "N Dt"], student_hidden: Float[Tensor, "N Ds"]
    ) -> Float[Tensor, "N R"]:
        """u/√r + c of each state; both hidden states are taken as constants."""
        parts = [self.teacher.coefficients(teacher_hidden)]
        if self.student is not None:
            parts.append(self.student.coefficients(student_hidden))
        return torch.cat(parts, dim=1)

    def table(self, teacher: Head, student: Head) -> Float[Tensor, "V R"]:
        """P e_a of each token; both unembeddings are taken as constants."""
        parts = [self.teacher.table(teacher)]
        if self.student is not None:
            parts.append(self.student.table(student))
        return torch.cat(parts, dim=1)

    def activate(
        self, bilinear: Float[Tensor, "N V"], log_ratio: Float[Tensor, "N V"]
    ) -> Float[Tensor, "N V"]:
        """f from the bilinear part (coefficients @ table.T) and log ρ (finite)."""
        if self.ratio_weight is not None:
            bilinear = torch.addcmul(bilinear, log_ratio, self.ratio_weight)
        return _BoundedTanh.apply(bilinear, self.bound)

    def extra_parameters(self) -> list[Tensor]:
        """What :meth:`activate` adds to coefficients and table."""
        return [] if self.ratio_weight is None else [self.ratio_weight]


class _BoundedTanh(torch.autograd.Function):
    """B · tanh(x) as B (2σ(2x) − 1): on a CPU the sigmoid costs a quarter of the tanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        y = torch.mul(x, 2.0).sigmoid_().mul_(2 * bound).sub_(bound)
        ctx.save_for_backward(y)
        ctx.bound = bound
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return y.square().mul_(-1 / ctx.bound).add_(ctx.bound).mul_(grad_outputs[0]), None


class CriticPair:
    """The critics of off-policy and of on-policy text, and their optimiser."""

    def __init__(
        self,
        config: CriticConfig,
        teacher_size: int,
        student_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._critics = {
            source: Critic(
                config.features, teacher_size, student_size, generator,
                rank=config.rank, bound=config.bound, ratio_start=config.ratio_start,
            ).to(device)
            for source in SOURCES
        }  # fmt: skip
        self._max_grad_norm = config.max_grad_norm
        self.optimizer = torch.optim.Adam(self.parameters(), lr=config.learning_rate, betas=(0.0, 0.9))

    @property
    def off(self) -> Critic:
        return self._critics["off"]

    @property
    def on(self) -> Critic:
        return self._critics["on"]

    def __getitem__(self, source: str) -> Critic:
        return self._critics[source]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for critic in self._critics.values() for parameter in critic.parameters()]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        """Clip each critic's gradient by itself, then Adam. A critic without gradient stays.

        Returns the norm of both gradients before clipping.

        Raises: FloatingPointError when it is not finite; no parameter has moved then.
        """
        norms = [
            nn.utils.clip_grad_norm_(critic.parameters(), self._max_grad_norm)
            for critic in self._critics.values()
        ]
        norm = torch.linalg.vector_norm(torch.stack([value.float() for value in norms]))
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the critics' gradient has norm {norm.item()}: a state, logit or critic is not finite"
            )
        self.optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and Adam's state by flat names: what a checkpoint keeps, no pickle."""
        tensors = {
            f"critic.{source}.{name}": value.detach()
            for source, critic in self._critics.items()
            for name, value in critic.named_parameters()
        }
        return tensors | optimizer_tensors(self.optimizer, "critic_optimizer")

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`; other names are left alone."""
        with torch.no_grad():
            for source, critic in self._critics.items():
                for name, value in critic.named_parameters():
                    value.copy_(tensors[f"critic.{source}.{name}"])
        load_optimizer_tensors(self.optimizer, dict(tensors), "critic_optimizer")
