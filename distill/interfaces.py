"""Protocols between the loops of :mod:`distill.algorithm` and the parts that do the work.

All engines pass one contract suite (tests/integration/test_engine_contract_*.py); ``tests/fakes.py`` has
fakes of the engines and the learner for tests of the loops. Values that cross a process boundary
are small frozen dataclasses of plain values; a group of rows crosses it as a :class:`GroupRef`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from distill.errors import DistillError

Table = Literal["student_text", "teacher_text", "heldout"]
"""``student_text``: prompts to roll out; ``teacher_text``: rows of teacher text (samples of the teacher
or references); ``heldout``: prompts of the evaluation, which are never in the replay index."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One draw of the data order: the unit of the ledger.

    ``number`` counts the draws of the table from 0; ``index`` is the row that was drawn, of the prompt
    table (``student_text``, ``heldout``) or of the corpus (``teacher_text``). Before training, when the corpus
    is written, ``index`` is the row of the prompt that the teacher answers.
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
    """Where a group's record batch is stored: one Arrow IPC message in a segment file."""

    node: str
    segment: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class GroupRef:
    """A stored group, as the replay index knows it."""

    draw: Draw
    location: Location
    num_rows: int
    num_tokens: int
    """Response tokens of all rows."""
    oldest_version: int | None
    """Oldest policy version that sampled one of its tokens; None for teacher text."""


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """The teacher's next work: rolled-out groups to read, and draws to look up in the corpus."""

    groups: tuple[GroupRef, ...] = ()
    teacher_draws: tuple[Draw, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.groups or self.teacher_draws)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The groups of one update: acknowledged after it, issued again otherwise."""

    update: int
    """Number of the update that uses it, from 0."""
    groups: tuple[GroupRef, ...]
    policy_ages: tuple[int, ...]
    """Age of each student group in updates, by its oldest token."""


Tokens = Sequence[int] | np.ndarray
"""Token ids: a list, or an integer array such as a row of an Arrow batch, which an engine converts once."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One response to sample at temperature 1, without top-p or penalties."""

    prompt_tokens: Tokens
    max_new_tokens: int
    seed: int | None
    """The response is a function of the seed, the prompt and the weights. None: it is drawn from the engine's own
    generator, so the other requests decide it too, and a run that samples so cannot be repeated."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A generator's response to a :class:`SampleRequest`."""

    response_tokens: list[int]
    """Includes the stop token if one ended the text."""
    logprobs: list[float]
    """Nats, one per response token, under the weights that sampled it."""
    policy_versions: list[tuple[int, int]]
    """(first token, version) of each span of weights."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """A push: where its bytes are, their version and their checksum."""

    policy_version: int
    update: int
    """Number of updates applied to these weights."""
    path: str
    """A safetensors file in shared memory on this node."""
    num_bytes: int
    checksum: str
    """xxh3-64 over the file's bytes, hexadecimal."""


class Generator(Protocol):
    """Samples responses from the current student, or from the teacher when a corpus is written."""

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample all requests as one batch; returns the responses in the order of the requests."""
        ...

    async def greedy(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuation of each prompt, its stop token included."""
        ...

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a push. Requests in flight continue with the new weights.

        Raises: WeightPushError when checksum, size or version differ from the manifest;
        distill.weights.StalePush, and keeps its weights, when they are not older than the push.
        """
        ...

    async def policy_version(self) -> int:
        """Return the version that samples now; 0 before the first push."""
        ...

    async def close(self) -> None:
        """End the engine and every process it started."""
        ...


class Teacher(Protocol):
    """Scores text with the teacher.

    Calls may overlap: their texts share the engine's steps. A call fails alone, unless the engine dies. A call
    that is cancelled frees the engine of its texts.
    """

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        """Compute the final-norm hidden state before each response token.

        Returns one uint16 array [T, D] (bf16 bits) per pair, in order.
        """
        ...

    async def close(self) -> None:
        """End the engine and every process it started. Calls under way fail."""
        ...


class Replay(Protocol):
    """The index of the replay buffer. Its waits are long polls; an empty result means that the run is over."""

    async def admit(self, max_draws: int) -> list[Draw]:
        """Return the prompts to roll out next. Waits for the rate limiter."""
        ...

    async def insert(self, groups: Sequence[GroupRef]) -> None:
        """Add rolled-out groups that are already in the store."""
        ...

    async def take_for_scoring(self, max_groups: int) -> ScoringJob:
        """Return groups and teacher draws that have no payload yet. Waits until there are some."""
        ...

    async def insert_scored(self, groups: Sequence[GroupRef]) -> None:
        """Add groups with their payload."""
        ...

    async def lease(self, update: int) -> Lease | None:
        """Return the groups of ``update``. Waits until all are scored; None when the run is over."""
        ...

    async def acknowledge(self, update: int) -> None:
        """Record that the update was applied: its groups are trained, provisionally until ``commit``."""
        ...

    async def advance(self, updates_done: int, policy_version: int) -> None:
        """Record that ``policy_version`` (weights after ``updates_done`` updates) is live in every engine."""
        ...


class Prompts(Protocol):
    """The prompt table: draws as sample requests, and responses as groups."""

    def requests(self, draws: Sequence[Draw]) -> list[SampleRequest]:
        """Return ``samples_per_prompt`` requests per draw, in draw order, seeded by (run, draw, sample)."""
        ...

    def groups(self, draws: Sequence[Draw], completions: Sequence[Completion]) -> list[pa.RecordBatch]:
        """Build one validated batch per draw from the responses to :meth:`requests`."""
        ...


class Corpus(Protocol):
    """Fixed text, one row per corpus index, in the trajectory schema without payload."""

    def rows(self, draws: Sequence[Draw]) -> list[pa.RecordBatch]:
        """Return one batch of one row per draw, with the ids of the draw."""
        ...


class Store(Protocol):
    """Writes this process's segment files and reads those of every process."""

    def append(self, draw: Draw, batch: pa.RecordBatch) -> GroupRef:
        """Write one group. When this returns, the group survives the death of this process."""
        ...

    def read(self, group: GroupRef) -> pa.RecordBatch:
        """Map a group without copying.

        Raises: SegmentMissing when its segment is gone.
        """
        ...


class Learner(Protocol):
    """Critics and student: one update from one batch."""

    def update(self, batches: Sequence[pa.RecordBatch]) -> dict[str, float]:
        """Take the critic steps, then the student step; returns the metrics of this update."""
        ...


class Publisher(Protocol):
    """Pushes the learner's weights into every generator."""

    async def publish(self, updates_done: int) -> int:
        """Push as one transaction with a deadline; returns the new policy version.

        Raises: WeightPushError.
        """
        ...


class WeightPushError(DistillError, RuntimeError):
    """A push that did not arrive complete, in time and under the right version."""

    code = "weight_push"


class EngineDied(DistillError, RuntimeError):
    """A process of an inference engine ended unexpectedly."""

    code = "engine_died"


class SegmentMissing(DistillError, LookupError):
    """A group whose segment is in neither shared memory nor the spill folder, or is too short to contain it."""

    code = "segment_missing"
