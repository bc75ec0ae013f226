"""When a run records, evaluates and saves: the schedule around its updates.

Called by :func:`distill.algorithm.train_loop`, in the driver.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from deploy.run.training.adaptive_share import AdaptiveShare
from deploy.run.training.evaluations import Evaluations
from deploy.run.training.fleet import Fleet
from deploy.run.training.recorder import Recorder
from deploy.run.training.room import Room
from distill.config import RunConfig
from distill.evaluation import Evaluation, is_better
from distill.interfaces import Lease
from distill.replay.spans import SpanKind
from distill.run.folder import RunFolder


@dataclass
class Spent:
    """Seconds of a training. A learner that is started again continues them."""

    began: float = field(default_factory=time.monotonic)
    beside: dict[str, float] = field(default_factory=lambda: {"evaluation": 0.0, "checkpoint": 0.0})
    """How long evaluations and checkpoints took, in lock-step between the updates and otherwise beside them."""
    held_s: float = 0.0
    """How long updates waited for evaluations and checkpoints beside them: for copies of weights, and for earlier
    ones. It is 0 in lock-step, where :attr:`beside` are between the updates."""

    def by_activity(self, *, lock_step: bool) -> dict[str, float]:
        """The seconds so far."""
        training = time.monotonic() - self.began - sum(self.beside.values()) * lock_step
        return {"training": training, **self.beside, "update_waited_for_milestones": self.held_s}


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
        spent: Spent,
        room: Room,
    ) -> None:
        """``stats``: the counters of all actors. ``spent``: where the seconds are added up. ``room``: waits while a file does
        not fit."""
        self._config = config
        self._folder = folder
        self._fleet = fleet
        self._recorder = recorder
        self._evaluations = evaluations
        self._adaptive_share = adaptive_share
        self._stats = stats
        self._evaluating: asyncio.Task[None] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._spent = spent
        self._room = room

    async def before_training(self, updates_done: int, policy_version: int) -> None:
        await self._room.of(lambda: self._recorder.start(updates_done))
        self._recorder.note_start(updates_done, policy_version)
        if updates_done == 0:
            await self._evaluate("before", 0, self._config.evaluation.num_prompts, keep_answers=True)
        self._recorder.start_clock()

    def samples_after(self, updates_done: int) -> bool:
        """Whether there is an evaluation after this update."""
        every = self._config.evaluation.every
        return self._is_last(updates_done) or bool(every and updates_done % every == 0)

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        """Record an update, and start what is due. In lock-step, and after the last update, it also waits for the end.

        Otherwise the learner waits only until its weights are copied.
        """
        for task in (self._evaluating, self._saving):
            if task is not None and task.done():
                task.result()  # what failed beside the updates ends the run now, and not when the next is due
        row = metrics | await self._stats()
        await self._room.of(lambda: self._recorder.note_draws(updates_done, lease))
        self._recorder.update(updates_done, policy_version, lease, row)
        if metrics.get("learner/num_nonfinite"):
            skipped = await self._fleet.learner.skipped(updates_done)
            if skipped is not None:
                self._recorder.event("update_skipped", **skipped)
        start = time.monotonic()
        is_last = self._is_last(updates_done)
        if self.samples_after(updates_done):
            await self._end_of(self._evaluating)
            copied = asyncio.Event()
            self._evaluating = asyncio.create_task(self._evaluate_after(updates_done, copied))
            await _first(copied, self._evaluating)
            if self._in_turns or is_last:
                await self._end_of(self._evaluating)
        if is_last or updates_done % self._config.checkpoint.every == 0:
            await self._end_of(self._saving)
            self._saving = await self._start_to_save(updates_done, policy_version)
            if self._in_turns or is_last:
                await self._end_of(self._saving)
        if not (self._in_turns or is_last):
            self._spent.held_s += time.monotonic() - start
        self._recorder.start_clock()

    async def _end_of(self, task: asyncio.Task[None] | None) -> None:
        if task is not None:
            await task

    def close(self) -> None:
        """Give up what is still under way, when the run ends by an error."""
        for task in (self._evaluating, self._saving):
            if task is not None:
                task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
                task.cancel()

    @property
    def _in_turns(self) -> bool:
        return self._config.replay.lock_step

    def _is_last(self, updates_done: int) -> bool:
        return updates_done == self._config.learner.num_updates

    async def _evaluate_after(self, updates_done: int, copied: asyncio.Event) -> None:
        """An evaluation, and what follows from it."""
        settings = self._config.evaluation
        if self._is_last(updates_done):
            await self._evaluate(
                "after", updates_done, settings.num_prompts, keep_answers=True, on_copied=copied.set
            )
            return
        found = await self._evaluate(
            f"step-{updates_done}",
            updates_done,
            settings.num_prompts_during,
            keep_answers=False,
            on_copied=copied.set,
        )
        self._recorder.evaluated(updates_done, found)
        await self._keep_best(updates_done, found)
        share = self._adaptive_share.after_evaluation(found)
        if share is not None:
            await self._fleet.replay.set_student_share(share)
            self._recorder.event("student_share", update=updates_done, share=share)

    async def _evaluate(
        self,
        label: str,
        updates_done: int,
        num_prompts: int,
        *,
        keep_answers: bool,
        on_copied: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        with self._activity(SpanKind.EVALUATION, f"evaluation {label}", updates_done):
            evaluation = await self._evaluations.evaluate(
                label, num_prompts, keep_answers=keep_answers, on_copied=on_copied
            )
        self._recorder.measured(updates_done, evaluation)
        return evaluation

    async def _keep_best(self, updates_done: int, evaluation: Evaluation) -> None:
        """Keep the student if an evaluation is the best so far."""
        metric = self._config.evaluation.best_metric
        best, value = self._folder.read_best(), evaluation.value(metric)
        comparable = best is not None and best["metric"] == metric
        if not is_better(metric, value, best["value"] if best and comparable else None):
            return
        numbers = {"update": updates_done, "metric": metric, "value": value}
        await self._evaluations.keep_best(numbers)
        self._recorder.event("best", **numbers)

    async def _start_to_save(self, updates_done: int, policy_version: int) -> asyncio.Task[None]:
        """Start a checkpoint whose acknowledgements become final when it is durable.

        The order matters: before the checkpoint is durable, a crash would undo the update.
        """
        await self._room.of(self._recorder.flush)
        state = {
            "updates_done": updates_done,
            "policy_version": policy_version,
            "ledger": await self._fleet.replay.state(),
            "adaptive_share": self._adaptive_share.state(),
            "alarms": self._recorder.alarms.state(),
        }
        # The learner takes calls in their order, so it copies its tensors before the next update.
        first: list[Awaitable[float]] = [self._fleet.learner.save(updates_done, state)]

        def save() -> Awaitable[float]:
            return first.pop() if first else self._fleet.learner.save(updates_done, state)

        return asyncio.create_task(self._commit(save, updates_done))

    async def _commit(self, save: Callable[[], Awaitable[float]], updates_done: int) -> None:
        with self._activity(SpanKind.CHECKPOINT, "checkpoint", updates_done):
            copy_s = await self._room.of(save)
        if not self._in_turns and not self._is_last(updates_done):
            self._spent.held_s += copy_s
        await self._fleet.replay.commit(updates_done)
        self._recorder.event("checkpoint", updates_done=updates_done)

    @contextmanager
    def _activity(self, kind: SpanKind, shown: str, updates_done: int) -> Iterator[Any]:
        """Count the seconds of an activity, and show it in the trace and the live line."""
        start = time.monotonic()
        self._recorder.report(activity=shown)
        with self._recorder.trace.span(kind, "driver", updates_done):
            yield
        self._spent.beside[kind.name.lower()] += time.monotonic() - start
        self._recorder.report(activity="training")


async def _first(event: asyncio.Event, task: asyncio.Task[None]) -> None:
    """Wait until an event happens or a task ends; raises the task's error."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait([waiting, task], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
