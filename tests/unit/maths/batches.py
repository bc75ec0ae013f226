"""A student of a few numbers, random batches for it, and ways to pack them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.config import CriticConfig
from learner.batch import TEXTS, Pack, TokenBatch
from learner.model.head import Head, LogitTransform
from learner.update.critics import CriticPair, ModelSize

VOCABULARY = 11
STUDENT_SIZE = 6
TEACHER_SIZE = 5
SIZES = ModelSize(TEACHER_SIZE, VOCABULARY), ModelSize(STUDENT_SIZE, VOCABULARY)


class TinyStudent(nn.Module):
    """States that depend on the input token and its place in the sequence; float64."""

    def __init__(self, num_tokens: int = VOCABULARY, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.transform = LogitTransform()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.embedding = parameter(VOCABULARY, STUDENT_SIZE)
        self.position = parameter(32, STUDENT_SIZE)
        self.head_weight = parameter(num_tokens, STUDENT_SIZE)

    def states(self, pack: Pack) -> Tensor:
        hidden = torch.tanh(self.embedding[pack.input_ids] + self.position[pack.position_ids])
        return hidden[pack.state_index]


def teacher_head(num_tokens: int = VOCABULARY, seed: int = 7) -> Head:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_tokens, TEACHER_SIZE, generator=generator, dtype=torch.float64)
    return Head(weight, LogitTransform(scale=0.7, softcap=20.0))


def critic_pair(
    config: CriticConfig, *, shake: float = 0.0, sizes: tuple[ModelSize, ModelSize] = SIZES
) -> CriticPair:
    """Critics in float64; ``shake`` moves every parameter off its start. ``sizes``: teacher's, student's."""
    pair = CriticPair(config, *sizes, seed=3)
    generator = torch.Generator().manual_seed(4)
    for text in TEXTS:
        pair[text].double()
        pair._means[text].double()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter += shake * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return pair


@dataclass(frozen=True)
class Row:
    prompt: list[int]
    response: list[int]
    counted: list[bool]
    is_student_text: bool
    group: int
    hidden: Tensor
    behavior: Tensor


def random_rows(seed: int = 0) -> list[Row]:
    """Two groups of student text (of 3 and 2 rows), four rows of other text, one half masked."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    rows = []
    for group in (0, 0, 0, 1, 1, -1, -1, -1, -1):
        length = integers(1, 10, 1)[0] if group < 0 else integers(3, 10, 1)[0]
        counted = [True] * length
        if len(rows) == 6:
            counted = [t % 2 == 0 for t in range(length)]
        rows.append(
            Row(
                prompt=integers(0, VOCABULARY, integers(1, 6, 1)[0]),
                response=integers(0, VOCABULARY, length),
                counted=counted,
                is_student_text=group >= 0,
                group=group,
                hidden=torch.randn(length, TEACHER_SIZE, generator=generator).bfloat16(),
                behavior=-3 * torch.rand(length, generator=generator) if group >= 0 else torch.zeros(length),
            )
        )
    return rows


def batch_of(rows: Sequence[Row], packs: Sequence[Sequence[int]] | None = None) -> TokenBatch:
    """``packs``: numbers of the rows in each forward pass; None: a pass for each row."""
    packs = [[number] for number in range(len(rows))] if packs is None else packs
    counts = {on: sum(sum(row.counted) for row in rows if row.is_student_text == on) for on in (False, True)}
    return TokenBatch(
        packs=tuple(_pack(rows, members) for members in packs),
        group=torch.tensor([row.group for row in rows]),
        num_teacher_tokens=counts[False],
        num_student_tokens=counts[True],
        num_teacher_rows=sum(not row.is_student_text for row in rows),
        num_student_rows=sum(row.is_student_text for row in rows),
        num_input_tokens=sum(len(row.prompt) + len(row.response) - 1 for row in rows),
    )


def _pack(rows: Sequence[Row], members: Sequence[int]) -> Pack:
    inputs: list[int] = []
    sequences: list[int] = []
    positions: list[int] = []
    states: list[int] = []
    for number in members:
        row = rows[number]
        sequence = row.prompt + row.response[:-1]
        states += range(len(inputs) + len(row.prompt) - 1, len(inputs) + len(sequence))
        inputs += sequence
        sequences.append(len(sequence))
        positions += range(len(sequence))
    picked = [rows[number] for number in members]
    lengths = torch.tensor([len(row.response) for row in picked])
    return Pack(
        input_ids=torch.tensor(inputs),
        position_ids=torch.tensor(positions),
        sequence_lengths=tuple(sequences),
        state_index=torch.tensor(states),
        targets=torch.tensor([token for row in picked for token in row.response]),
        teacher_hidden=torch.cat([row.hidden for row in picked]),
        counted=torch.tensor([value for row in picked for value in row.counted]),
        is_student_text=torch.tensor([row.is_student_text for row in picked]).repeat_interleave(lengths),
        row=torch.tensor(list(members)).repeat_interleave(lengths),
        step=torch.cat([torch.arange(len(row.response)) for row in picked]),
        behavior_logprobs=torch.cat([row.behavior for row in picked]),
    )
