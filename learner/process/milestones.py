"""When a run records, evaluates and saves: the schedule around its updates.

Called by :func:`distill.algorithm.train_loop`, in the learner's process.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from distill.config import RunConfig
from distill.evaluation import Evaluation
from distill.interfaces import Lease
from learner.process.adaptive_share import AdaptiveShare
from learner.process.evaluator import Evaluator
from learner.process.recorder import Recorder
from learner.process.saver import CommitTarget, Saver


class ReplayControl(CommitTarget, Protocol):
    """The replay service as the milestones see it."""

    async def stats(self) -> dict[str, float]: ...

    async def set_student_share(self, share: float) -> None: ...


class RunMilestones:
    """Implements :class:`distill.algorithm.Milestones` for a run."""

    def __init__(
        self,
        config: RunConfig,
        replay: ReplayControl,
        recorder: Recorder,
        evaluator: Evaluator,
        saver: Saver,
        adaptive_share: AdaptiveShare,
        stats: Sequence[Callable[[], Awaitable[dict[str, float]]]],
    ) -> None:
        """``stats``: counters of the other actors, one callable each."""
        self._config = config
        self._replay = replay
        self._recorder = recorder
        self._evaluator = evaluator
        self._saver = saver
        self._adaptive_share = adaptive_share
        self._stats = [*stats, replay.stats]
        self.seconds = {"evaluation": 0.0, "checkpoint": 0.0}
        """Time spent outside of updates, by activity."""

    async def before_training(self, updates_done: int, policy_version: int) -> None:
        self._recorder.start(updates_done, policy_version)
        if updates_done == 0:
            await self._evaluate("before", self._config.evaluation.num_prompts, keep_answers=True)
        self._recorder.start_clock()

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        await self._recorder.update(updates_done, policy_version, lease, metrics, self._stats)
        evaluation, checkpoint = self._config.evaluation, self._config.checkpoint
        is_last = updates_done == self._config.learner.num_updates
        if is_last:
            await self._evaluate("after", evaluation.num_prompts, keep_answers=True)
        elif evaluation.every and updates_done % evaluation.every == 0:
            await self._evaluate_during(updates_done)
        if is_last or updates_done % checkpoint.every == 0:
            await self._save(updates_done, policy_version)
        self._recorder.start_clock()

    async def _evaluate_during(self, updates_done: int) -> None:
        """An evaluation between two updates, and what follows from it."""
        num_prompts = self._config.evaluation.num_prompts_during
        found = await self._evaluate(f"step-{updates_done}", num_prompts, keep_answers=False)
        self._recorder.evaluated(updates_done, found)
        metric = self._config.evaluation.best_metric
        value = await self._saver.keep_best(updates_done, metric, found)
        if value is not None:
            self._recorder.event("best", update=updates_done, metric=metric, value=value)
        share = self._adaptive_share.after_evaluation(found)
        if share is not None:
            await self._replay.set_student_share(share)
            self._recorder.event("student_share", update=updates_done, share=share)

    async def _evaluate(self, label: str, num_prompts: int, *, keep_answers: bool) -> Evaluation:
        with self._activity("evaluation", f"evaluation {label}"):
            evaluation = await self._evaluator.evaluate(label, num_prompts, keep_answers=keep_answers)
        self._recorder.event("evaluated", label=label, **evaluation.to_dict())
        return evaluation

    async def _save(self, updates_done: int, policy_version: int) -> None:
        with self._activity("checkpoint", "checkpoint"):
            self._recorder.flush()
            await self._saver.save(updates_done, policy_version, self._replay)
        self._recorder.event("checkpoint", updates_done=updates_done)

    @contextmanager
    def _activity(self, kind: str, shown: str) -> Iterator[Any]:
        """Count the seconds of an activity, and show it in the live line."""
        start = time.monotonic()
        self._recorder.report(activity=shown)
        yield
        self.seconds[kind] += time.monotonic() - start
        self._recorder.report(activity="training")
