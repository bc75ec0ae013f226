"""Engines that count what they do, for the statistics of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from distill.interfaces import Completion, Generator, SampleRequest, Teacher, Tokens, WeightManifest
from distill.machine.clock import BusyClock

EngineT = TypeVar("EngineT", Generator, Teacher)


class _Metered(Generic[EngineT]):
    """An engine with a clock."""

    def __init__(self, inner: EngineT) -> None:
        self.inner = inner
        self.num_tokens = 0
        self.clock = BusyClock()

    @property
    def num_finished(self) -> int:
        return self.inner.num_finished

    @property
    def silent_s(self) -> float:
        """Seconds for which the engine has had work and finished none of it."""
        return self.clock.silent_s(self.num_finished)

    async def close(self) -> None:
        await self.inner.close()


class MeteredGenerator(_Metered[Generator]):
    """A generator that counts samples, tokens and busy seconds."""

    def __init__(self, inner: Generator) -> None:
        super().__init__(inner)
        self.num_samples = 0

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        with self.clock.running():
            completions = await self.inner.generate(requests)
        self.num_samples += len(completions)
        self.num_tokens += sum(len(completion.response_tokens) for completion in completions)
        return completions

    async def greedy(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[list[int]]:
        with self.clock.running():
            return await self.inner.greedy(prompts, max_new_tokens)

    async def update_weights(self, manifest: WeightManifest) -> None:
        await self.inner.update_weights(manifest)

    async def policy_version(self) -> int:
        return await self.inner.policy_version()


class MeteredTeacher(_Metered[Teacher]):
    """A teacher that counts texts, tokens and busy seconds."""

    def __init__(self, inner: Teacher) -> None:
        super().__init__(inner)
        self.num_texts = 0

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        with self.clock.running():
            states = await self.inner.hidden_states(prompts, responses)
        self.num_texts += len(states)
        self.num_tokens += sum(map(len, prompts)) + sum(map(len, responses))
        return states
