"""Engines that count what they do, for the statistics of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.interfaces import Completion, Generator, SampleRequest, Teacher, Tokens, WeightManifest
from distill.machine.clock import BusyClock


class MeteredGenerator:
    """A generator that counts samples, tokens and busy seconds."""

    def __init__(self, inner: Generator) -> None:
        self.inner = inner
        self.num_samples = 0
        self.num_tokens = 0
        self.clock = BusyClock()

    @property
    def num_finished(self) -> int:
        return self.inner.num_finished

    @property
    def silent_s(self) -> float:
        """Seconds for which the engine has had requests and finished none."""
        return self.clock.silent_s(self.num_finished)

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

    async def close(self) -> None:
        await self.inner.close()


class MeteredTeacher:
    """A teacher that counts texts, tokens and busy seconds."""

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner
        self.num_texts = self.num_tokens = 0
        self.clock = BusyClock()

    @property
    def num_finished(self) -> int:
        return self.inner.num_finished

    @property
    def silent_s(self) -> float:
        """Seconds for which the engine has had texts and scored none."""
        return self.clock.silent_s(self.num_finished)

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        with self.clock.running():
            states = await self.inner.hidden_states(prompts, responses)
        self.num_texts += len(states)
        self.num_tokens += sum(map(len, prompts)) + sum(map(len, responses))
        return states

    async def close(self) -> None:
        await self.inner.close()
