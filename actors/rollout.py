"""The rollout worker, a plain class that samples the student's text.

It owns a generator and this process's segment store. It runs :func:`distill.algorithm.rollout_loop` and,
between updates, samples held-out prompts for an evaluation. :class:`actors.shells.RolloutActor` makes it an
actor.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.metered import MeteredGenerator
from actors.shown import ShownPrompts
from distill.algorithm import roll_out, rollout_loop
from distill.interfaces import Draw, Generator, Holder, Prompts, Replay, SampleRef, WeightManifest
from distill.machine.clock import SILENT
from distill.replay.desk import Desk
from distill.replay.segments import SegmentStore
from distill.replay.tidy import deleting_dead_segments


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
        holder: Holder,
        capacity: int,
        together: bool,
    ) -> None:
        """``capacity``: draws at a time."""
        self.prompts = prompts
        self.heldout = heldout
        self.shown = shown
        self.generator = MeteredGenerator(generator)
        self.store = store
        self.holder = holder
        self.capacity = capacity
        self.together = together
        self._heldout_samples: list[SampleRef] = []
        self._desk: Desk | None = None

    async def run(self, replay: Replay) -> None:
        """Sample until the replay reports the end of the run."""
        self._desk = desk = Desk(
            replay,
            self.holder,
            self.store,
            capacity=1 if self.together else self.capacity,
            samples_per_draw=self.prompts.samples_per_prompt,
            clock=self.generator.clock,
        )
        async with deleting_dead_segments(replay, self.store):
            await rollout_loop(desk, self.prompts, self.generator, self.store, together=self.together)

    async def sample_heldout(self, numbers: Sequence[int]) -> list[SampleRef]:
        """Sample some of the held-out prompts once each.

        The seeds are the same at every evaluation, so that two evaluations of one prompt differ only by the
        weights.
        """
        draws = [Draw(table="heldout", number=i, epoch=0, index=i) for i in numbers]
        samples = await roll_out(draws, self.heldout, self.generator, self.store)
        self._heldout_samples += samples
        return samples

    async def answer_shown(self) -> list[list[int]]:
        """The student's greedy answers to the prompts that the report shows."""
        return await self.shown.answers(self.generator)

    def release_heldout(self) -> None:
        """Give up the held-out samples after the evaluation has read them."""
        self.store.settle(self._heldout_samples)
        self._heldout_samples = []

    async def update_weights(self, manifest: WeightManifest) -> None:
        await self.generator.update_weights(manifest)

    def retire(self) -> None:
        """Take no more work; :meth:`run` ends when what is begun is delivered."""
        if self._desk is not None:
            self._desk.retire()

    async def idle(self) -> None:
        """Wait until nothing is being sampled for training."""
        if self._desk is not None:
            await self._desk.idle()

    def stats(self) -> dict[str, float]:
        """Counters. An actor is busy while its engine has requests, and blocked while it is idle and holds no draw."""
        clock = self.generator.clock
        return {
            "rollout/num_actors": 1.0,
            "rollout/num_samples": float(self.generator.num_samples),
            "rollout/num_tokens": float(self.generator.num_tokens),
            "rollout/num_bytes": float(self.store.num_appended_bytes),
            "rollout/num_diverted": float(self.store.num_diverted),
            SILENT: self.generator.silent_s,
            "timing/rollout_busy_s": clock.busy_s,
            "timing/rollout_storing_s": clock.storing_s,
            "timing/rollout_blocked_s": clock.waiting_s,
        }

    async def close(self) -> None:
        await self.generator.close()
