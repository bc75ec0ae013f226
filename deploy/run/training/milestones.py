"""When a run records, evaluates and saves: the schedule around its updates.

Called by :func:`distill.algorithm.train_loop`, in the driver.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deploy.run.training.adaptive_share import AdaptiveShare
from deploy.run.training.evaluations import Evaluations
from deploy.run.training.fleet import Fleet
from deploy.run.training.recorder import Recorder
from distill.config import RunConfig
from distill.evaluation import Evaluation, is_better
from distill.interfaces import Lease
from distill.run.folder import RunFolder


class RunMilestones:
    """Implements :class:`distill.algorithm.Milestones` for a run."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        fleet: Fleet,
        recorder: Recorder,
        evaluations: Evaluations,
        adaptive_share: AdaptiveShare,
        stats: Callable[[], Awaitable[dict[str, float]]],
    ) -> None:
        """``stats``: the counters of all actors."""
        self._config = config
        self._folder = folder
        self._fleet = fleet
        self._recorder = recorder
        self._evaluations = evaluations
        self._adaptive_share = adaptive_share
        self._stats = stats
        self._saving: asyncio.Task[None] | None = None
        self.seconds = {"evaluation": 0.0, "checkpoint": 0.0}
        """Time that the learner spent outside of updates, by activity."""

    async def before_training(self, updates_done: int, policy_version: int) -> None:
        self._recorder.start(updates_done, policy_version)
        if updates_done == 0:
            await self._evaluate("before", self._config.evaluation.num_prompts, keep_answers=True)
        self._recorder.start_clock()

    def samples_after(self, updates_done: int) -> bool:
        """Whether there is an evaluation after this update."""
        every = self._config.evaluation.every
        return self._is_last(updates_done) or bool(every and updates_done % every == 0)

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        self._recorder.update(updates_done, policy_version, lease, metrics | await self._stats())
        is_last = self._is_last(updates_done)
        if is_last:
            await self._evaluate("after", self._config.evaluation.num_prompts, keep_answers=True)
        elif self.samples_after(updates_done):
            await self._evaluate_during(updates_done)
        if is_last or updates_done % self._config.checkpoint.every == 0:
            await self._save(updates_done, policy_version)
        if is_last:
            await self.finish()
        self._recorder.start_clock()

    async def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._saving is not None:
            with self._activity("checkpoint", "checkpoint"):
                await self._saving
            self._saving = None

    def _is_last(self, updates_done: int) -> bool:
        return updates_done == self._config.learner.num_updates

    async def _evaluate_during(self, updates_done: int) -> None:
        """An evaluation between two updates, and what follows from it."""
        num_prompts = self._config.evaluation.num_prompts_during
        found = await self._evaluate(f"step-{updates_done}", num_prompts, keep_answers=False)
        self._recorder.evaluated(updates_done, found)
        await self._keep_best(updates_done, found)
        share = self._adaptive_share.after_evaluation(found)
        if share is not None:
            await self._fleet.replay.set_student_share(share)
            self._recorder.event("student_share", update=updates_done, share=share)

    async def _evaluate(self, label: str, num_prompts: int, *, keep_answers: bool) -> Evaluation:
        with self._activity("evaluation", f"evaluation {label}"):
            evaluation = await self._evaluations.evaluate(label, num_prompts, keep_answers=keep_answers)
        self._recorder.event("evaluated", label=label, **evaluation.to_dict())
        return evaluation

    async def _keep_best(self, updates_done: int, evaluation: Evaluation) -> None:
        """Keep the student if an evaluation is the best so far."""
        metric = self._config.evaluation.best_metric
        best, value = self._folder.read_best(), evaluation.value(metric)
        comparable = best is not None and best["metric"] == metric
        if not is_better(metric, value, best["value"] if best and comparable else None):
            return
        await self._fleet.learner.write_student("best")
        self._folder.write_best({"update": updates_done, "metric": metric, "value": value})
        self._recorder.event("best", update=updates_done, metric=metric, value=value)

    async def _save(self, updates_done: int, policy_version: int) -> None:
        """Write a checkpoint, then make its acknowledgements final.

        The order matters: before the checkpoint is durable, a crash would undo the update. In lock-step the next
        update waits for the disk; otherwise only for the copy of the weights.
        """
        await self.finish()
        with self._activity("checkpoint", "checkpoint"):
            self._recorder.flush()
            state = {
                "updates_done": updates_done,
                "policy_version": policy_version,
                "ledger": await self._fleet.replay.state(),
                "adaptive_share": self._adaptive_share.state(),
                "alarms": self._recorder.alarms.state(),
            }
            # The learner takes calls in their order, so it copies the weights before its next update.
            saved = self._fleet.learner.save(updates_done, state)
            self._saving = asyncio.create_task(self._commit(saved, updates_done))
            if self._config.replay.lock_step:
                await self.finish()

    async def _commit(self, saved: Awaitable[None], updates_done: int) -> None:
        await saved
        await self._fleet.replay.commit(updates_done)
        self._recorder.event("checkpoint", updates_done=updates_done)

    @contextmanager
    def _activity(self, kind: str, shown: str) -> Iterator[Any]:
        """Count the seconds of an activity, and show it in the live line."""
        start = time.monotonic()
        self._recorder.report(activity=shown)
        yield
        self.seconds[kind] += time.monotonic() - start
        self._recorder.report(activity="training")
