"""The two critics: bounded action-value functions over the whole vocabulary.

    f(s, a) = B · tanh( u(h)·(P e_a)/√r + c·(P e_a)  [+ the same from the student]  [+ s · log ρ(s, a)] )
    u(h) = W2 gelu(W1 norm(h))

or, dense (``rank`` null), with a row w_a and a constant b_a for every token instead of the product:

    f(s, a) = B · tanh( norm(h)·w_a/√D + b_a  [+ ...] )

h is a model's state before the token, e_a the normalised row of that model's unembedding for token a,
and ρ = π*/π. ``features`` selects the terms: ``teacher`` has the first, ``both`` the first from each
model, ``ratio`` the first from the teacher and the log-ratio. W2 and c (or w and b) start at 0, so a
critic starts at f = 0, and a ratio-aware one (s = ½) at tanh(½ log ρ) = (π* − π)/(π* + π), the optimum
of the regularised game at λ = 2/B, where its gradient is exactly 0 (:func:`optimum`).

The argument of the tanh is a head of rank r, (u/√r + c) · (P e_a), or, dense, a head over the features.
It is therefore computed and differentiated as logits are (:func:`learner.model.chunked.chunked_loss`),
from *coefficients* [N, R] and a *table* [V, R] that is computed once per critic step. Everything is
float32. No gradient reaches a backbone or an unembedding.

Legend: N states, D features, V vocabulary, R coefficients (r, or D + 1 if dense; twice that with ``both``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.config import CriticConfig
from distill.errors import Diverged
from learner.batch import TEXTS, Text
from learner.model.head import Head
from learner.optimizer import load_optimizer_tensors, optimizer_tensors

_MIN_WIDTH = 128


class ModelSize(NamedTuple):
    """The sizes of a model that a critic depends on."""

    hidden_size: int
    num_tokens: int


class _Bilinear(nn.Module):
    """u(h)·(P e_a)/√r + c·(P e_a) for the states and the unembedding of one model."""

    def __init__(self, hidden_size: int, rank: int, generator: torch.Generator, *, random: bool) -> None:
        super().__init__()
        width = max(_MIN_WIDTH, 2 * rank)
        self.w1 = nn.Parameter(torch.randn(width, hidden_size, generator=generator) / math.sqrt(hidden_size))
        self.b1 = nn.Parameter(torch.zeros(width))
        self.w2 = nn.Parameter(torch.zeros(rank, width))
        self.constant = nn.Parameter(torch.zeros(rank))
        self.projection = nn.Parameter(torch.randn(rank, hidden_size, generator=generator))
        if random:
            self.w2.data = torch.randn(rank, width, generator=generator) / math.sqrt(width)

    def coefficients(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N r"]:
        hidden = hidden.detach().to(self.w1.dtype)
        normalised = F.layer_norm(hidden, hidden.shape[-1:])
        u = F.gelu(normalised @ self.w1.T + self.b1) @ self.w2.T
        return u / math.sqrt(len(self.constant)) + self.constant

    def table(self, head: Head) -> Float[Tensor, "V r"]:
        weight = head.weight.detach()
        projected = weight @ self.projection.to(weight.dtype).T
        return projected.to(self.projection.dtype) / head.row_norms[:, None]


class _Dense(nn.Module):
    """norm(h)·w_a/√D + b_a: a separate row for every token; the unembedding is not used."""

    def __init__(
        self, hidden_size: int, num_tokens: int, generator: torch.Generator, *, random: bool
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(num_tokens, hidden_size + 1))
        if random:
            self.rows.data = torch.randn(num_tokens, hidden_size + 1, generator=generator)

    def coefficients(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N R"]:
        hidden = hidden.detach().to(self.rows.dtype)
        normalised = F.layer_norm(hidden, hidden.shape[-1:]) / math.sqrt(hidden.shape[1])
        return F.pad(normalised, (0, 1), value=1.0)

    def table(self, head: Head) -> Float[Tensor, "V R"]:
        return self.rows[: head.num_tokens]


class Critic(nn.Module):
    """One critic. Its initial values depend only on the generator."""

    def __init__(
        self, config: CriticConfig, teacher: ModelSize, student: ModelSize, generator: torch.Generator
    ) -> None:
        super().__init__()

        def part(size: ModelSize) -> _Bilinear | _Dense:
            random = config.start == "random"
            if config.rank is None:
                return _Dense(size.hidden_size, size.num_tokens, generator, random=random)
            return _Bilinear(size.hidden_size, config.rank, generator, random=random)

        self.bound = config.bound
        self.teacher = part(teacher)
        self.student = part(student) if config.features == "both" else None
        start = torch.tensor(float(config.ratio_start))
        self.ratio_weight = nn.Parameter(start) if config.features == "ratio" else None

    def coefficients(
        self, teacher_hidden: Float[Tensor, "N Dt"], student_hidden: Float[Tensor, "N Ds"]
    ) -> Float[Tensor, "N R"]:
        """u/√r + c of each state; both hidden states are constants."""
        parts = [self.teacher.coefficients(teacher_hidden)]
        if self.student is not None:
            parts.append(self.student.coefficients(student_hidden))
        return torch.cat(parts, dim=1)

    def table(self, teacher: Head, student: Head) -> Float[Tensor, "V R"]:
        """P e_a of each token; both unembeddings are constants."""
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
        """The parameters that only :meth:`activate` uses."""
        return [] if self.ratio_weight is None else [self.ratio_weight]


def optimum(log_ratio: Float[Tensor, "N V"], variance_penalty: float) -> Float[Tensor, "N V"]:
    """f° = (2/λ) tanh(½ log ρ) = (2/λ) (π* − π)/(π* + π), the minimiser of the critics' loss.

    The operations are those of :meth:`Critic.activate`, so a ratio-aware critic at its start equals it to the
    last bit if λ = 2/B.
    """
    return _bounded_tanh(0.5 * log_ratio, 2 / variance_penalty)


def _bounded_tanh(x: Tensor, bound: float) -> Tensor:
    """B · tanh(x) as B (2σ(2x) − 1), because on a CPU a sigmoid takes a quarter of the time of a tanh."""
    return torch.mul(x, 2.0).sigmoid_().mul_(2 * bound).sub_(bound)


class _BoundedTanh(torch.autograd.Function):
    """:func:`_bounded_tanh` with its derivative taken from its value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        y = _bounded_tanh(x, bound)
        ctx.save_for_backward(y)
        ctx.bound = bound
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return y.square().mul_(-1 / ctx.bound).add_(ctx.bound).mul_(grad_outputs[0]), None


class CriticPair:
    """The critics of teacher text and of student text, and their optimizer."""

    def __init__(
        self,
        config: CriticConfig,
        teacher: ModelSize,
        student: ModelSize,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._critics: dict[Text, Critic] = {
            text: Critic(config, teacher, student, generator).to(device) for text in TEXTS
        }
        self._ema = config.ema
        self._means = copy.deepcopy(self._critics) if config.ema else self._critics
        self._max_grad_norm = config.max_grad_norm
        self.optimizer = torch.optim.Adam(self.parameters(), lr=config.learning_rate, betas=(0.0, 0.9))

    def __getitem__(self, text: Text) -> Critic:
        return self._critics[text]

    def witness(self, text: Text) -> Critic:
        """The critic that the student plays against: the newest one, or its running mean (``ema``)."""
        return self._means[text]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for critic in self._critics.values() for parameter in critic.parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trained ones, by the names that a checkpoint gives them."""
        return [(name, value) for name, value in self._named() if name.startswith("critic.")]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        """Clip each critic's gradient separately, then take a step of Adam.

        A critic without gradient is left unchanged. Returns the norm of both gradients before clipping.

        Raises: Diverged when the norm is not finite; this step has changed no critic then.
        """
        norms = [
            nn.utils.clip_grad_norm_(critic.parameters(), self._max_grad_norm)
            for critic in self._critics.values()
        ]
        device = self.parameters()[0].device  # the norm of a critic without gradient is on the CPU
        norm = torch.linalg.vector_norm(torch.stack([value.to(device, torch.float32) for value in norms]))
        if not torch.isfinite(norm):
            raise Diverged(
                "norm of the critics' gradient", norm.item(), "be finite",
                "lower critic.learning_rate or learner.learning_rate",
            )  # fmt: skip
        self.optimizer.step()
        if self._ema:
            self._update_means()
        return norm

    @torch.no_grad()
    def _update_means(self) -> None:
        for text, critic in self._critics.items():
            for mean, value in zip(self._means[text].parameters(), critic.parameters(), strict=True):
                mean.lerp_(value, 1 - self._ema)

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and Adam's state by flat names, for a checkpoint without pickle."""
        return {name: value.detach() for name, value in self._named()} | optimizer_tensors(
            self.optimizer, "critic_optimizer"
        )

    def copy(self) -> dict[str, Tensor]:
        """:meth:`state_dict`, which later steps do not change."""
        return {name: value.clone() for name, value in self.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`; other names are ignored."""
        with torch.no_grad():
            for name, value in self._named():
                value.copy_(tensors[name])
        self.optimizer.state.clear()  # before the first step, Adam has no state
        load_optimizer_tensors(self.optimizer, dict(tensors), "critic_optimizer")

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        kinds = {"critic": self._critics} | ({"critic_mean": self._means} if self._ema else {})
        for kind, critics in kinds.items():
            for text, critic in critics.items():
                for name, value in critic.named_parameters():
                    yield f"{kind}.{text}.{name}", value
