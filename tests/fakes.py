"""Fakes of the engines and the learner, for tests of the loops.

The real ones have tests of their own: tests/integration/test_engine_contract_*.py, tests/unit/learner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from distill.interfaces import Completion, Lease, SampleRequest, Store, Tokens, WeightManifest
from distill.schema import Trajectory, trajectory_batch
from distill.weights import require_newer


class FakeGenerator:
    """Returns tokens that depend only on the seed, after one to three times ``delay_s`` seconds.

    Without a seed they are different at every call.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.version = 0
        self.delay_s = delay_s
        self.num_calls = 0
        self.num_finished = 0

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        self.num_calls += 1
        version = self.version
        await asyncio.sleep(self.delay_s * (1 + self.num_calls % 3))
        self.num_finished += len(requests)
        return [self._complete(request, version) for request in requests]

    def _complete(self, request: SampleRequest, version: int) -> Completion:
        generator = np.random.default_rng(request.seed)
        length = int(generator.integers(1, request.max_new_tokens + 1))
        return Completion(
            response_tokens=generator.integers(0, 50, length).tolist(),
            logprobs=[-1.0] * length,
            policy_versions=[(0, version)],
            finish_reason="length" if length == request.max_new_tokens else "stop",
        )

    async def greedy(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[list[int]]:
        return [list(prompt)[-max_new_tokens:] for prompt in prompts]

    async def update_weights(self, manifest: WeightManifest) -> None:
        require_newer(manifest.policy_version, self.version)
        self.version = manifest.policy_version

    async def policy_version(self) -> int:
        return self.version

    async def close(self) -> None:
        pass


class FakeTeacher:
    """Returns the response's tokens as hidden states, so that tests detect mixed-up rows."""

    width = 4

    def __init__(self) -> None:
        self.num_finished = 0

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        await asyncio.sleep(0)
        self.num_finished += len(responses)
        return [np.repeat(np.array(tokens, np.uint16)[:, None], self.width, 1) for tokens in responses]

    async def close(self) -> None:
        pass


class FakeLearner:
    """Records the draws and the rows of every update."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.seen: list[list[str]] = []
        self.rows: list[list[pa.RecordBatch]] = []

    async def update(self, lease: Lease) -> dict[str, float]:
        await asyncio.sleep(0)
        self.seen.append([group.draw.draw_id for group in lease.groups])
        self.rows.append([self.store.read(sample) for group in lease.groups for sample in group.samples])
        return {"policy/loss": float(len(self.seen))}


class FakePublisher:
    """Counts versions, and sets the generator's version when a push is sent."""

    def __init__(self, generator: FakeGenerator, first_version: int = 1) -> None:
        self.generator = generator
        self.version = first_version - 1
        self.sending = False

    async def write(self, updates_done: int) -> WeightManifest:
        assert not self.sending, "the weights of a push must be in the engines before the next is written"
        self.version += 1
        return WeightManifest(
            policy_version=self.version, update=updates_done, path="", num_bytes=0, checksum=""
        )

    async def send(self, manifest: WeightManifest) -> None:
        self.sending = True
        await asyncio.sleep(0)
        self.generator.version = manifest.policy_version
        self.sending = False


class FakeMilestones:
    """Records its calls and their leases."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.leases: list[Lease] = []

    async def before_training(self, updates_done: int, policy_version: int) -> None:
        self.calls.append((updates_done, policy_version))

    def samples_after(self, updates_done: int) -> bool:
        return updates_done % 2 == 0

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        self.calls.append((updates_done, policy_version))
        self.leases.append(lease)


def corpus_rows(num_rows: int, source: str = "teacher") -> pa.Table:
    """Return a corpus of teacher text with short rows."""
    rows = [
        Trajectory(
            draw_id=f"row-{i}",
            source=source,
            prompt_index=i,
            sample_index=0,
            prompt_tokens=[1, i % 40 + 2],
            response_tokens=[i % 50, (i + 1) % 50, (i + 2) % 50][: 1 + i % 3],
            finish_reason="stop",
        )
        for i in range(num_rows)
    ]
    return pa.Table.from_batches([trajectory_batch(rows)])
