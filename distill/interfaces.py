"""Protocols between the loops of :mod:`distill.algorithm` and the parts that do the work.

All engines pass one contract suite (tests/integration/test_engine_contract_*.py); ``tests/fakes.py`` has
fakes of the engines and the learner for tests of the loops. Values that cross a process boundary
are small frozen dataclasses of plain values; a stored row crosses it as a :class:`SampleRef`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from distill.errors import DistillError

Tokens: TypeAlias = Sequence[int] | np.ndarray
"""Token ids: a list, or an integer array such as a row of an Arrow batch, which an engine converts once."""
Role: TypeAlias = Literal["rollout", "teacher", "proxy"]
"""The pools of actors that make rows."""
Kind: TypeAlias = Literal["rollout", "scoring"]
"""The two kinds of work that the replay hands out."""
Table = Literal["student_text", "teacher_text", "heldout"]
"""``student_text``: prompts to roll out; ``teacher_text``: rows of teacher text (samples of the teacher
or references); ``heldout``: prompts of the evaluation, which are never in the replay index."""


@dataclass(frozen=True, order=True)
class Holder:
    """An actor that holds work, in one of its incarnations. A name is never used twice in a run.

    Segments, leases of work and metrics carry the name, so what arrives late from a dead incarnation is
    not taken for what its heir sends.
    """

    role: Role
    number: int
    """Place in the role's pool, from 0. An heir has the same number."""
    incarnation: int = 0

    def __str__(self) -> str:
        return f"{self.role}-{self.number}.{self.incarnation}"

    @property
    def kind(self) -> Kind:
        """The work that it takes."""
        return "rollout" if self.role == "rollout" else "scoring"


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
    issue: int = 0
    """How often it was issued before, because an actor died with it or its group became too old."""

    @property
    def draw_id(self) -> str:
        return f"{self.table}-{self.epoch}-{self.number}"

    @property
    def work_id(self) -> str:
        """Unique among all work that is ever handed out."""
        return f"{self.draw_id}.{self.issue}"


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a row is stored: one Arrow IPC message in a segment file."""

    node: str
    segment: str
    offset: int
    num_bytes: int
    trajectory_id: str
    """What the row calls itself, so that a reader notices another row. A row of teacher text has the name of the
    draw that it was scored for, whichever draw uses it."""


@dataclass(frozen=True, kw_only=True)
class SampleRef:
    """A stored row, as the replay index knows it: a student's sample, or a row of teacher text."""

    draw: Draw
    sample: int
    """Number within the group, from 0."""
    location: Location
    num_tokens: int
    """Response tokens."""
    oldest_version: int | None
    """Oldest policy version that sampled one of its tokens; None for teacher text."""

    @property
    def work_id(self) -> str:
        return f"{self.draw.work_id}/{self.sample}"


@dataclass(frozen=True, kw_only=True)
class GroupRef:
    """All rows of one draw: the unit of leases, age and eviction."""

    draw: Draw
    samples: tuple[SampleRef, ...]


Work: TypeAlias = Draw | SampleRef
"""What an actor is given: a draw to roll out (a rollout actor) or to look up in the corpus and score (a teacher
actor), or a sample to score."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The answer to :meth:`Replay.exchange`."""

    work: tuple[Work, ...] = ()
    """New work, and work whose earlier answer did not arrive. A caller ignores what it has already."""
    refused: tuple[str, ...] = ()
    """``work_id`` of delivered samples that no draw waits for: late, or a second version. They are in no group."""
    over: bool = False
    """No more work will come: the run has ended, or the caller was declared dead."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The groups of one update: acknowledged after it, issued again otherwise."""

    update: int
    """Number of the update that uses it, from 0."""
    groups: tuple[GroupRef, ...]
    policy_ages: tuple[int, ...]
    """Age of each student group in updates, by its oldest token."""


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

    @property
    def num_finished(self) -> int:
        """Number of requests that have ended so far. It grows while a call with several requests runs."""
        ...

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

    @property
    def num_finished(self) -> int:
        """Number of texts that have been scored so far. It grows while a call with several texts runs."""
        ...

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        """Compute the final-norm hidden state before each response token.

        Returns one uint16 array [T, D] (bf16 bits) per pair, in order.
        """
        ...

    async def close(self) -> None:
        """End the engine and every process it started. Calls under way fail."""
        ...


class Replay(Protocol):
    """The index of the replay buffer. Its waits are long polls."""

    async def exchange(
        self, holder: Holder, done: Sequence[SampleRef], holding: Sequence[str], room: int
    ) -> Exchange:
        """Deliver finished samples and take new work, in one call that may be repeated.

        ``done``: samples that are already in the store. ``holding``: ``work_id`` of everything that the caller
        still works on, ``done`` excluded. ``room``: how much more it can take. Waits for work if there is
        room and nothing to tell; a newer call of the same holder ends the wait of an older one.
        """
        ...

    async def live_segments(self, names: Sequence[str]) -> list[str]:
        """Return those of the segments that contain a row which is still needed."""
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
    """The prompt table: draws as sample requests, and responses as rows."""

    samples_per_prompt: int

    def requests(self, draws: Sequence[Draw]) -> list[SampleRequest]:
        """Return ``samples_per_prompt`` requests per draw, in draw order, seeded by (run, draw, sample)."""
        ...

    def row(self, draw: Draw, sample: int, completion: Completion) -> pa.RecordBatch:
        """Build the validated row of one response."""
        ...


class Corpus(Protocol):
    """Fixed text, one row per corpus index, in the trajectory schema without payload."""

    def row(self, draw: Draw) -> pa.RecordBatch:
        """Return the batch of one row that a draw selects, with the ids of the draw."""
        ...


class Store(Protocol):
    """Writes this process's segment files and reads those of every process."""

    def append(self, draw: Draw, sample: int, row: pa.RecordBatch) -> SampleRef:
        """Write one row. When this returns, the row survives the death of this process."""
        ...

    def read(self, sample: SampleRef) -> pa.RecordBatch:
        """Map a row without copying.

        Raises: SegmentMissing when its segment is gone, or another row is in its place.
        """
        ...

    def settle(self, samples: Sequence[SampleRef]) -> None:
        """Record that the replay index knows these rows of this writer, or that they will not be needed."""
        ...


class Learner(Protocol):
    """Critics and student: one update from the groups of one lease."""

    async def update(self, lease: Lease) -> dict[str, float]:
        """Take the critic steps, then the student step; returns the metrics of this update."""
        ...


class Publisher(Protocol):
    """Pushes the learner's weights into every generator."""

    async def write(self, updates_done: int) -> WeightManifest:
        """Copy the learner's weights under a new version. They may change when this returns."""
        ...

    async def send(self, manifest: WeightManifest) -> None:
        """Have every generator load the copy, as one transaction with a deadline.

        Raises: WeightPushError.
        """
        ...


class WeightPushError(DistillError, RuntimeError):
    """A push that did not arrive complete, in time and under the right version."""

    code = "weight_push"


class EngineDied(DistillError, RuntimeError):
    """A process of an inference engine ended unexpectedly."""

    code = "engine_died"


class ReplayUnavailable(DistillError, ConnectionError):
    """A call to the replay whose answer did not arrive. It may have taken effect or not, so it is repeated."""

    code = "replay_unavailable"


class SegmentMissing(DistillError, LookupError):
    """A row whose segment is in neither shared memory nor the spill folder, or does not contain it."""

    code = "segment_missing"
