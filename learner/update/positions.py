"""What the steps of an update share: both policies, and the positions at which they are compared.

Legend: N positions (response tokens), D features, V vocabulary (the common prefix of both models').
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from learner.batch import Pack, Text, TokenBatch
from learner.model.head import Head, LogitTransform


@runtime_checkable
class TrainedModel(Protocol):
    """The parts of the trained model that an update uses."""

    @property
    def head_weight(self) -> nn.Parameter: ...

    @property
    def transform(self) -> LogitTransform: ...

    def states(self, pack: Pack) -> Tensor:
        """[N, D]: final-norm hidden states before the pack's response tokens."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]: ...


class Policies(NamedTuple):
    """Both policies at some positions, with each exponential computed once. The teacher is a constant."""

    policy_logprobs: Float[Tensor, "N V"]
    teacher_logprobs: Float[Tensor, "N V"]
    policy_probs: Float[Tensor, "N V"]
    teacher_probs: Float[Tensor, "N V"]

    @classmethod
    def from_logits(cls, policy_logits: Tensor, teacher_logits: Tensor) -> Policies:
        policy_logprobs = policy_logits.log_softmax(-1)
        with torch.no_grad():
            teacher_logprobs = teacher_logits.log_softmax(-1)
            teacher_probs = teacher_logprobs.exp()
        return cls(policy_logprobs, teacher_logprobs, policy_logprobs.exp(), teacher_probs)

    def detach(self) -> Policies:
        return Policies(*(value.detach() for value in self))

    def log_ratio(self) -> Tensor:
        """log ρ = log π*/π."""
        return self.teacher_logprobs - self.policy_logprobs

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The first two arguments of an objective."""
        return self.policy_logprobs, self.teacher_logprobs

    @property
    def probs(self) -> dict[str, Tensor]:
        """The keyword arguments that save an objective its exponentials."""
        return {"policy_probs": self.policy_probs, "teacher_probs": self.teacher_probs}


@dataclass(frozen=True)
class Positions:
    """The counted response positions of a batch, flat; constants for critics and credit."""

    student_hidden: Float[Tensor, "N Ds"]
    teacher_hidden: Float[Tensor, "N Dt"]
    is_student_text: Bool[Tensor, " N"]
    row: Int[Tensor, " N"]
    step: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    behavior_logprobs: Float[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.row)

    def select(self, mask: Bool[Tensor, " N"]) -> Positions:
        return Positions(**{name: value[mask] for name, value in vars(self).items()})

    def of(self, text: Text) -> Positions:
        return self.select(self.is_student_text if text == "student_text" else ~self.is_student_text)


@dataclass(frozen=True)
class Heads:
    """The unembeddings of both models over their common vocabulary, as constants."""

    student: Head
    teacher: Head

    @classmethod
    def of(cls, student: TrainedModel, teacher: Head) -> Heads:
        head = Head(student.head_weight.detach(), student.transform.detach())
        num_tokens = min(head.num_tokens, teacher.num_tokens)
        return cls(head.prefix(num_tokens), teacher.prefix(num_tokens))

    @property
    def num_tokens(self) -> int:
        return self.teacher.num_tokens


def collect_positions(
    student: TrainedModel, batch: TokenBatch, *, keep_graph: bool = False
) -> tuple[Positions, list[Tensor] | None]:
    """Run the backbone over all packs; the positions are constants.

    ``keep_graph``: also return each pack's states [N, Ds] with their graphs, so that the student step need
    not run the backbone again. The activations of all packs are then kept.
    """
    parts: list[Positions] = []
    kept: list[Tensor] = []
    for pack in batch.packs:
        with torch.set_grad_enabled(keep_graph):
            states = student.states(pack)
        if keep_graph:
            kept.append(states)
        part = Positions(
            states.detach(), teacher_hidden(pack), pack.is_student_text, pack.row, pack.step, pack.targets,
            pack.behavior_logprobs,
        )  # fmt: skip
        parts.append(part.select(pack.counted))
    together = Positions(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})
    return together, kept or None


def teacher_hidden(pack: Pack) -> Tensor:
    if pack.teacher_hidden is None:
        raise ValueError("a pack has no teacher states, but the recipe's losses need the teacher's policy")
    return pack.teacher_hidden


def to_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The values as numbers, with one wait for the device."""
    if not metrics:
        return {}
    values = torch.stack([value.detach().double().reshape(()) for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))
