"""The rollout worker: the student's samples, as a plain class.

Owns a generator and this process's segment store; runs :func:`distill.algorithm.rollout_loop`
and, between updates, samples held-out prompts for an evaluation. The actor's shell around it is
:class:`actors.shells.RolloutActor`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from distill.algorithm import roll_out, rollout_loop
from distill.interfaces import (
    Completion,
    Draw,
    Generator,
    GroupRef,
    Prompts,
    SampleRequest,
    WeightManifest,
)
from distill.replay.segments import SegmentStore
from distill.replay.service import ReplayService
from distill.replay.tidy import release_segments


class MeteredGenerator:
    """A generator that counts tokens and busy seconds; overlapping calls count once."""

    def __init__(self, inner: Generator) -> None:
        self.inner = inner
        self.num_tokens = 0
        self.num_samples = 0
        self.busy_s = 0.0
        self._running = 0
        self._since = 0.0

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        if self._running == 0:
            self._since = time.monotonic()
        self._running += 1
        try:
            completions = await self.inner.generate(requests)
        finally:
            self._running -= 1
            if self._running == 0:
                self.busy_s += time.monotonic() - self._since
        self.num_samples += len(completions)
        self.num_tokens += sum(len(completion.response_tokens) for completion in completions)
        return completions

    async def update_weights(self, manifest: WeightManifest) -> None:
        await self.inner.update_weights(manifest)

    async def policy_version(self) -> int:
        return await self.inner.policy_version()

    async def close(self) -> None:
        await self.inner.close()


class RolloutWorker:
    """Samples training prompts as they are admitted, and held-out prompts on request."""

    def __init__(
        self,
        *,
        prompts: Prompts,
        heldout: Prompts,
        generator: Generator,
        store: SegmentStore,
        writer_id: str,
        together: bool,
    ) -> None:
        self.prompts = prompts
        self.heldout = heldout
        self.generator = MeteredGenerator(generator)
        self.store = store
        self.writer_id = writer_id
        self.together = together
        self._heldout_groups: list[GroupRef] = []

    async def run(self, replay: ReplayService, max_draws: int = 1) -> None:
        """Until the replay says that the run is over."""
        tidy = asyncio.create_task(release_segments(replay.freed_segments, self.store, self.writer_id))
        try:
            await rollout_loop(
                replay, self.prompts, self.generator, self.store, max_draws=max_draws, together=self.together
            )
        finally:
            tidy.cancel()

    async def sample_heldout(self, num_prompts: int) -> list[GroupRef]:
        """One sample of each of the first held-out prompts.

        The seeds are the same at every evaluation, so that two evaluations of one prompt
        differ by the weights alone.
        """
        draws = [Draw(table="heldout", number=i, epoch=0, index=i) for i in range(num_prompts)]
        groups = await roll_out(draws, self.heldout, self.generator, self.store)
        self._heldout_groups += groups
        return groups

    def release_heldout(self) -> None:
        """The evaluation has read them."""
        self.store.discard(self._heldout_groups)
        self._heldout_groups = []

    async def update_weights(self, manifest: WeightManifest) -> None:
        await self.generator.update_weights(manifest)

    def stats(self) -> dict[str, float]:
        return {
            "rollout/num_samples": float(self.generator.num_samples),
            "rollout/num_tokens": float(self.generator.num_tokens),
            "timing/rollout_busy_s": self.generator.busy_s,
        }

    async def close(self) -> None:
        await self.generator.close()
