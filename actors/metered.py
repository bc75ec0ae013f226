"""Engines that count what they do, for the statistics of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from distill.interfaces import Completion, Generator, SampleRequest, Teacher, Tokens, WeightManifest


class BusyClock:
    """Adds up the seconds in which at least one call runs; overlapping calls count once."""

    def __init__(self) -> None:
        self._num_running = 0
        self._since = 0.0
        self._finished_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds of a ``with`` block as busy."""
        if self._num_running == 0:
            self._since = time.monotonic()
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._finished_s += time.monotonic() - self._since

    @property
    def busy_s(self) -> float:
        """Busy seconds so far, running calls included."""
        running_s = time.monotonic() - self._since if self._num_running else 0.0
        return self._finished_s + running_s


class MeteredGenerator:
    """A generator that counts samples, tokens and busy seconds."""

    def __init__(self, inner: Generator) -> None:
        self.inner = inner
        self.num_samples = 0
        self.num_tokens = 0
        self.clock = BusyClock()

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
    """A teacher that counts tokens and busy seconds."""

    def __init__(self, inner: Teacher) -> None:
        self.inner = inner
        self.num_tokens = 0
        self.clock = BusyClock()

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        with self.clock.running():
            states = await self.inner.hidden_states(prompts, responses)
        self.num_tokens += sum(map(len, prompts)) + sum(map(len, responses))
        return states

    async def close(self) -> None:
        await self.inner.close()
