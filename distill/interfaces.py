"""Protocols between the loops of :mod:`distill.algorithm` and the parts that do the work.

Every part has a real implementation (vLLM, Ray, torch) and a fake in ``tests/fakes.py``;
both pass one contract suite. Values that cross a process are small frozen dataclasses of
plain numbers; rows cross as :class:`Location`, never by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from distill.errors import DistillError

Table = Literal["student_text", "teacher_text", "heldout"]
"""``student``: prompts to roll out; ``text``: rows of the corpus (teacher samples or references);
``heldout``: evaluation, never in the replay index."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One draw of the data order: the unit of the ledger.

    ``number`` counts draws of the table from 0; ``index`` is the row of the prompt table
    (``student``) or of the corpus (``text``) that it fell on.
    """

    table: Table
    number: int
    epoch: int
    index: int

    @property
    def draw_id(self) -> str:
        return f"{self.table}-{self.epoch}-{self.number}"


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a group's record batch lies: one Arrow IPC message in a segment file."""

    node: str
    segment: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class GroupRef:
    """A group that is stored: what the replay index keeps of it."""

    draw: Draw
    location: Location
    num_rows: int
    num_tokens: int
    """Response tokens of all rows."""
    oldest_version: int | None
    """Oldest policy version that sampled one of its tokens; None for corpus text."""


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """What the teacher is to do next: rolled-out groups to read, corpus draws to look up."""

    groups: tuple[GroupRef, ...] = ()
    teacher_draws: tuple[Draw, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.groups or self.teacher_draws)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The groups of one update. Acknowledged after the update; re-issued if never."""

    update: int
    """Number of the update that uses it, from 0."""
    groups: tuple[GroupRef, ...]
    policy_ages: tuple[int, ...]
    """Age in updates of each student group, by its oldest token."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One response to sample at temperature 1, without top-p or penalties."""

    prompt_tokens: Sequence[int]
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a generator answers to a :class:`SampleRequest`."""

    response_tokens: list[int]
    """The stop token included when one ended the text."""
    logprobs: list[float]
    """Nats, one per response token, under the weights that sampled it."""
    policy_versions: list[tuple[int, int]]
    """(first token, version) of each span of weights."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """A push: where the bytes are, which version they are, and what they must hash to."""

    policy_version: int
    update: int
    """Updates applied to these weights."""
    path: str
    """A safetensors file in shared memory on this node."""
    num_bytes: int
    checksum: str
    """xxh3-64 over the file's bytes, hexadecimal."""


class Generator(Protocol):
    """Samples responses from the current student (or, for the corpus, from the teacher)."""

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample all requests, admitted together; answers in the order of the requests."""
        ...

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a push. Requests in flight go on under the new weights.

        Raises: WeightPushError when checksum, size or version is not what the manifest says.
        """
        ...

    async def policy_version(self) -> int:
        """The version that samples now; 0 before the first push."""
        ...

    async def close(self) -> None:
        """End the engine and every process it started."""
        ...


class Teacher(Protocol):
    """Scores text with the teacher."""

    hidden_size: int

    async def hidden_states(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Final-norm hidden state before each response token.

        Returns one uint16 array [T, D] (bf16 bits) per pair, in order.
        """
        ...

    async def close(self) -> None: ...


class Replay(Protocol):
    """The index of the replay buffer: waits are long polls, an empty answer means the run is over."""

    async def admit(self, max_draws: int) -> list[Draw]:
        """Prompts to roll out next. Waits for the rate limiter."""
        ...

    async def insert(self, groups: Sequence[GroupRef]) -> None:
        """Rolled-out groups, already written to the store."""
        ...

    async def take_for_scoring(self, max_groups: int) -> ScoringJob:
        """Groups and corpus draws that the teacher has not scored. Waits for some."""
        ...

    async def insert_scored(self, groups: Sequence[GroupRef]) -> None: ...

    async def lease(self, update: int) -> Lease | None:
        """The groups of ``update``. Waits until all are scored; None when the run is over."""
        ...

    async def acknowledge(self, update: int) -> None:
        """The update was applied: its groups are trained, provisionally until ``commit``."""
        ...

    async def advance(self, updates_done: int, policy_version: int) -> None:
        """``policy_version`` (weights after ``updates_done`` updates) is live in every engine."""
        ...


class Prompts(Protocol):
    """The prompt table, and the data order's rows as requests."""

    def requests(self, draws: Sequence[Draw]) -> list[SampleRequest]:
        """``samples_per_prompt`` requests per draw, in draw order, seeded by (run, draw, sample)."""
        ...

    def groups(self, draws: Sequence[Draw], completions: Sequence[Completion]) -> list[pa.RecordBatch]:
        """One validated batch per draw from the answers to :meth:`requests`."""
        ...


class Corpus(Protocol):
    """Fixed text, one row per corpus index, in the trajectory schema without payload."""

    def rows(self, draws: Sequence[Draw]) -> list[pa.RecordBatch]:
        """One batch of one row per draw, its draw id filled in."""
        ...


class Store(Protocol):
    """Segment files of this process, and reading of everybody's."""

    def append(self, draw: Draw, batch: pa.RecordBatch) -> GroupRef:
        """Write one group; durable against the death of this process when it returns."""
        ...

    def read(self, group: GroupRef) -> pa.RecordBatch:
        """Map a group without copying.

        Raises: SegmentMissing when its segment is gone.
        """
        ...


class Learner(Protocol):
    """Critics and student: one update from one batch."""

    def update(self, batches: Sequence[pa.RecordBatch]) -> dict[str, float]:
        """Critic steps, then the student step. Returns the metrics of this update."""
        ...


class Publisher(Protocol):
    """Pushes the learner's weights into every generator."""

    async def publish(self, updates_done: int) -> int:
        """A transaction with a deadline; returns the new policy version.

        Raises: WeightPushError.
        """
        ...


class WeightPushError(DistillError, RuntimeError):
    """A push that did not arrive whole, in time, or under the right version."""


class EngineDied(DistillError, RuntimeError):
    """A process of an inference engine has ended by itself."""


class SegmentMissing(DistillError, LookupError):
    """A location whose segment file is in neither shared memory nor the spill folder."""
