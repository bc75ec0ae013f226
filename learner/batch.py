"""Arrow rows to packed token batches: what the learner's update reads.

Sequences are packed into forward passes of a bounded number of tokens, without padding.
Only the states before response tokens are used, so the last response token is not an input.

Shapes: L inputs of a pack, N response tokens of a pack, B rows of a batch, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill.machine.bfloat16 import from_bits
from distill.schema import hidden_rows
from learner.ranks import Ranks

Text = Literal["teacher_text", "student_text"]
TEXTS: tuple[Text, Text] = ("teacher_text", "student_text")
"""The two texts of an update: ``teacher_text`` (sampled from the teacher, or references) and ``student_text``."""


@dataclass(frozen=True)
class Pack:
    """Sequences that share one forward pass."""

    input_ids: Tensor
    """[L] int64."""
    position_ids: Tensor
    """[L] int64; each sequence starts again at 0."""
    sequence_lengths: tuple[int, ...]
    """Inputs of each sequence, L in all."""
    state_index: Tensor
    """[N] int64: the input in the pack whose state precedes response token t."""
    targets: Tensor
    """[N] int64: the response tokens."""
    teacher_hidden: Tensor | None
    """[N, D] bfloat16: the teacher's state before each response token; None without payload."""
    counted: Tensor
    """[N] bool: the loss mask."""
    is_student_text: Tensor
    """[N] bool: whether the student wrote the token."""
    row: Tensor
    """[N] int64: row number in the batch."""
    step: Tensor
    """[N] int64: t, from 0."""
    behavior_logprobs: Tensor
    """[N] float32 nats; 0 for text that the student did not write."""

    def scores_not_finite(self) -> Tensor:
        """[N] bool: whether the teacher's state or the sampler's log-probability of a token is NaN or infinite."""
        wrong = ~self.behavior_logprobs.isfinite()
        return wrong if self.teacher_hidden is None else wrong | ~self.teacher_hidden.isfinite().all(dim=1)

    def to(self, device: torch.device) -> Pack:
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class TokenBatch:
    """One update's packs, with the denominators of its losses.

    On one of several ranks it has that rank's packs, and after :meth:`over` the counts of all ranks.
    """

    packs: tuple[Pack, ...]
    group: Tensor
    """[B] int64: number of each row's group; -1 for corpus rows."""
    num_teacher_tokens: int
    """Counted response tokens of text that the student did not write."""
    num_student_tokens: int
    """Counted response tokens of student text."""
    num_teacher_rows: int
    num_student_rows: int
    num_input_tokens: int
    """Inputs of all packs, which the backbone computes."""

    def to(self, device: torch.device) -> TokenBatch:
        return replace(self, packs=tuple(pack.to(device) for pack in self.packs), group=self.group.to(device))

    def over(self, ranks: Ranks) -> TokenBatch:
        """The batch with the counts of all ranks; every rank keeps its own packs and groups."""
        if ranks.alone:
            return self
        names = ("num_teacher_tokens", "num_student_tokens", "num_teacher_rows", "num_student_rows")
        counts = ranks.sum(torch.tensor([getattr(self, name) for name in names], device=self.group.device))
        return replace(self, **dict(zip(names, counts.tolist(), strict=True)))


@dataclass(frozen=True)
class _Row:
    """One row as numpy views of its batch."""

    number: int
    prompt: np.ndarray
    response: np.ndarray
    counted: np.ndarray
    behavior_logprobs: np.ndarray
    hidden: np.ndarray | None
    is_student_text: bool

    @property
    def num_inputs(self) -> int:
        return len(self.prompt) + len(self.response) - 1


def token_batch(batches: Sequence[pa.RecordBatch], micro_batch_tokens: int) -> TokenBatch:
    """Pack the rows of one update, in batches of one or more. Rows of one group have its ``group_id`` in common.

    Rows are numbered in the order given. Packing is first-fit decreasing: the longest row first, into the
    first pack with room; a row longer than ``micro_batch_tokens`` gets its own pack. The losses do not
    depend on the packing, because they are divided by counts over the whole batch.
    """
    rows: list[_Row] = []
    group: list[int] = []
    numbers: dict[str, int] = {}
    for batch in batches:
        found = _rows(batch, len(rows))
        rows += found
        for row, name in zip(found, batch.column("group_id").to_pylist(), strict=True):
            group.append(numbers.setdefault(name, len(numbers)) if row.is_student_text else -1)
    bins: list[list[_Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: (-row.num_inputs, row.number)):
        place = next((i for i, free in enumerate(room) if free >= row.num_inputs), None)
        if place is None:
            bins.append([])
            room.append(micro_batch_tokens)
            place = len(bins) - 1
        bins[place].append(row)
        room[place] -= row.num_inputs
    return TokenBatch(
        packs=tuple(_pack(members) for members in bins),
        group=torch.tensor(group, dtype=torch.int64),
        num_teacher_tokens=sum(int(row.counted.sum()) for row in rows if not row.is_student_text),
        num_student_tokens=sum(int(row.counted.sum()) for row in rows if row.is_student_text),
        num_teacher_rows=sum(not row.is_student_text for row in rows),
        num_student_rows=sum(row.is_student_text for row in rows),
        num_input_tokens=sum(row.num_inputs for row in rows),
    )


def _rows(batch: pa.RecordBatch, first: int) -> list[_Row]:
    hidden = hidden_rows(batch) if "teacher_hidden" in batch.schema.names else [None] * batch.num_rows
    rows = []
    for i in range(batch.num_rows):
        response = _list(batch, "response_tokens", i)
        assert response is not None
        counted = _list(batch, "loss_mask", i)
        behavior = _list(batch, "behavior_logprobs", i)
        prompt = _list(batch, "prompt_tokens", i)
        assert prompt is not None
        rows.append(
            _Row(
                number=first + i,
                prompt=prompt,
                response=response,
                counted=np.ones(len(response), bool) if counted is None else counted.astype(bool),
                behavior_logprobs=np.zeros(len(response), np.float32) if behavior is None else behavior,
                hidden=hidden[i],
                is_student_text=batch.column("source")[i].as_py() == "student",
            )
        )
    return rows


def _list(batch: pa.RecordBatch, name: str, row: int) -> np.ndarray | None:
    scalar = batch.column(name)[row]
    return scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None


def _pack(rows: Sequence[_Row]) -> Pack:
    starts = np.cumsum([0] + [row.num_inputs for row in rows])[:-1]
    inputs = [np.concatenate([row.prompt, row.response[:-1]]) for row in rows]
    states = [
        start + np.arange(len(row.prompt) - 1, row.num_inputs)
        for start, row in zip(starts, rows, strict=True)
    ]
    lengths = [len(row.response) for row in rows]
    hidden = None
    if all(row.hidden is not None for row in rows):
        bits = np.concatenate([row.hidden for row in rows if row.hidden is not None])
        hidden = from_bits(bits)
    return Pack(
        input_ids=_int64(np.concatenate(inputs)),
        position_ids=_int64(np.concatenate([np.arange(row.num_inputs) for row in rows])),
        sequence_lengths=tuple(row.num_inputs for row in rows),
        state_index=_int64(np.concatenate(states)),
        targets=_int64(np.concatenate([row.response for row in rows])),
        teacher_hidden=hidden,
        counted=torch.from_numpy(np.concatenate([row.counted for row in rows])),
        is_student_text=torch.from_numpy(np.repeat([row.is_student_text for row in rows], lengths)),
        row=_int64(np.repeat([row.number for row in rows], lengths)),
        step=_int64(np.concatenate([np.arange(length) for length in lengths])),
        behavior_logprobs=torch.from_numpy(
            np.concatenate([row.behavior_logprobs for row in rows]).astype(np.float32)
        ),
    )


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
