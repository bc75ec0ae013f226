"""The rollout worker, a plain class that samples the student's text.

It owns a generator and this process's segment store. It runs :func:`distill.algorithm.rollout_loop` and,
between updates, samples held-out prompts for an evaluation. :class:`actors.shells.RolloutActor` makes it an
actor.
"""

from __future__ import annotations

import asyncio

from actors.metered import MeteredGenerator
from actors.shown import ShownPrompts
from distill.algorithm import roll_out, rollout_loop
from distill.interfaces import Draw, Generator, GroupRef, Prompts, WeightManifest
from distill.replay.segments import SegmentStore
from distill.replay.service import ReplayService
from distill.replay.tidy import release_segments


class RolloutWorker:
    """Samples training prompts as they are admitted, and held-out prompts on request."""

    def __init__(
        self,
        *,
        prompts: Prompts,
        heldout: Prompts,
        shown: ShownPrompts,
        generator: Generator,
        store: SegmentStore,
        writer_id: str,
        together: bool,
    ) -> None:
        self.prompts = prompts
        self.heldout = heldout
        self.shown = shown
        self.generator = MeteredGenerator(generator)
        self.store = store
        self.writer_id = writer_id
        self.together = together
        self._heldout_groups: list[GroupRef] = []

    async def run(self, replay: ReplayService) -> None:
        """Sample until the replay reports the end of the run."""
        tidy = asyncio.create_task(release_segments(replay.freed_segments, self.store, self.writer_id))
        try:
            await rollout_loop(
                replay, self.prompts, self.generator, self.store, max_draws=1, together=self.together
            )
        finally:
            tidy.cancel()

    async def sample_heldout(self, num_prompts: int) -> list[GroupRef]:
        """Sample each of the first held-out prompts once.

        The seeds are the same at every evaluation, so that two evaluations of one prompt differ only by the
        weights.
        """
        draws = [Draw(table="heldout", number=i, epoch=0, index=i) for i in range(num_prompts)]
        groups = await roll_out(draws, self.heldout, self.generator, self.store)
        self._heldout_groups += groups
        return groups

    async def answer_shown(self) -> list[list[int]]:
        """The student's greedy answers to the prompts that the report shows."""
        return await self.shown.answers(self.generator)

    def release_heldout(self) -> None:
        """Discard the held-out samples after the evaluation has read them."""
        self.store.discard(self._heldout_groups)
        self._heldout_groups = []

    async def update_weights(self, manifest: WeightManifest) -> None:
        await self.generator.update_weights(manifest)

    def stats(self) -> dict[str, float]:
        return {
            "rollout/num_samples": float(self.generator.num_samples),
            "rollout/num_tokens": float(self.generator.num_tokens),
            "timing/rollout_busy_s": self.generator.clock.busy_s,
        }

    async def close(self) -> None:
        await self.generator.close()
