"""What happens around the updates of a run: records, evaluations, checkpoints.

Called by :func:`distill.algorithm.train_loop`, in the learner's process. Evaluation asks the
rollout actor for samples and the teacher actor for states; rows come back as locations.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from distill.config import CheckpointConfig, EvaluationConfig
from distill.evaluation import Evaluation, Score, is_better, measure, save_evaluation
from distill.interfaces import GroupRef, Lease, Store
from distill.run.alarms import Alarms
from distill.run.folder import RunFolder, write_bytes
from distill.run.metrics import EventLog, MetricsWriter
from learner.process.adaptive_share import AdaptiveShare
from learner.process.checkpoint import Checkpoints

NUM_ANSWERS = 3
"""Prompts whose answers are kept as text, for the report."""


class Samplers(Protocol):
    """The rollout worker and the teacher scorer, as an evaluation needs them."""

    async def sample_heldout(self, num_prompts: int) -> list[GroupRef]: ...

    async def score_samples(self, groups: Sequence[GroupRef]) -> list[GroupRef]: ...

    async def score_heldout(self, num_rows: int) -> list[GroupRef]: ...

    async def release_heldout(self) -> None: ...


class Ledger(Protocol):
    """The part of the replay service that checkpoints and evaluations need."""

    async def state(self) -> dict[str, Any]: ...

    async def commit(self, updates_done: int) -> None: ...

    async def stats(self) -> dict[str, float]: ...

    async def set_student_share(self, share: float) -> None: ...


class Evaluator:
    """Measures the current student on held-out prompts, with samples of its live weights."""

    def __init__(
        self,
        *,
        samplers: Samplers,
        store: Store,
        score: Score,
        decode: Callable[[list[int]], str],
        prompts: Sequence[str],
        references: dict[int, str],
    ) -> None:
        """``prompts``: text of the held-out prompts; ``references``: of the answers, by prompt."""
        self.samplers = samplers
        self.store = store
        self.score = score
        self.decode = decode
        self.prompts = prompts
        self.references = references
        self._teacher_rows: list[pa.RecordBatch] = []

    async def evaluate(self, label: str, num_prompts: int) -> tuple[Evaluation, list[dict[str, str]]]:
        """The evaluation, and the first prompts with both models' answers as text."""
        teacher_rows = await self._teacher_text(num_prompts)
        samples = await self.samplers.sample_heldout(num_prompts)
        scored = await self.samplers.score_samples(samples)
        student_rows = [self.store.read(group) for group in scored]
        evaluation = await asyncio.to_thread(
            measure,
            label,
            teacher_rows=teacher_rows,
            student_rows=student_rows,
            score=self.score,
            decode=self.decode,
            references=self.references,
        )
        answers = [
            {
                "prompt": self.prompts[teacher.column("prompt_index")[0].as_py()],
                "teacher": self._text(teacher),
                "student": self._text(student),
            }
            for teacher, student in zip(teacher_rows[:NUM_ANSWERS], student_rows[:NUM_ANSWERS], strict=True)
        ]
        await self.samplers.release_heldout()
        return evaluation, answers

    def _text(self, batch: pa.RecordBatch) -> str:
        return self.decode(batch.column("response_tokens")[0].as_py())

    async def _teacher_text(self, num_prompts: int) -> list[pa.RecordBatch]:
        """Scored once per run: the text and the teacher never change. Kept out of the segments,
        which are released after an evaluation."""
        if len(self._teacher_rows) < num_prompts:
            groups = await self.samplers.score_heldout(num_prompts)
            self._teacher_rows = [_owned(self.store.read(group)) for group in groups]
        return self._teacher_rows[:num_prompts]


def _owned(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A copy that does not lean on a mapped file."""
    message = batch.serialize()
    return pa.ipc.read_record_batch(message, batch.schema)


class RunMilestones:
    """Implements :class:`distill.algorithm.Milestones` for a run folder."""

    def __init__(
        self,
        *,
        folder: RunFolder,
        evaluator: Evaluator,
        ledger: Ledger,
        checkpoints: Checkpoints,
        tensors: Callable[[], dict[str, Any]],
        save_student: Callable[[Path], None],
        push_s: Callable[[], float],
        evaluation: EvaluationConfig,
        checkpoint: CheckpointConfig,
        adaptive_share: AdaptiveShare,
        alarms: Alarms,
        num_updates: int,
        stage_stats: Callable[[], Any],
        report: Callable[..., None],
    ) -> None:
        """``tensors``: what a checkpoint holds of the learner. ``stage_stats``: awaitable,
        counters of the actors. ``report``: keyword facts for the live line."""
        self.folder = folder
        self.evaluator = evaluator
        self.ledger = ledger
        self.checkpoints = checkpoints
        self.tensors = tensors
        self.save_student = save_student
        self.push_s = push_s
        self.evaluation = evaluation
        self.checkpoint = checkpoint
        self.adaptive_share = adaptive_share
        self.alarms = alarms
        self.num_updates = num_updates
        self.stage_stats = stage_stats
        self.report = report
        self.metrics = MetricsWriter(folder.path)
        self.events = EventLog(folder.path)
        self.evaluation_s = self.checkpoint_s = 0.0
        self._since = time.monotonic()

    async def before_training(self, updates_done: int, policy_version: int) -> None:
        self.metrics.truncate(updates_done)
        self.events.write("training_started", updates_done=updates_done, policy_version=policy_version)
        if updates_done == 0:
            await self._evaluate("before", self.evaluation.num_prompts, keep_answers=True)
        self._since = time.monotonic()

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        row = dict(metrics)
        ages = lease.policy_ages
        if ages:
            row["policy/age_max"] = float(max(ages))
            row["policy/age_mean"] = sum(ages) / len(ages)
        row["policy/version"] = float(policy_version)
        row["timing/push_s"] = self.push_s()
        row |= await self.ledger.stats()
        row |= await self.stage_stats()
        now = time.monotonic()
        row["timing/update_s"] = now - self._since
        self.metrics.write(updates_done, row)
        self._raise(updates_done, self.alarms.after_update(row))
        self.report(
            update=updates_done, policy_version=policy_version, policy_age=max(ages, default=0), row=row
        )
        if updates_done == self.num_updates:
            await self._evaluate("after", self.evaluation.num_prompts, keep_answers=True)
        elif self.evaluation.every and updates_done % self.evaluation.every == 0:
            label = f"step-{updates_done}"
            found = await self._evaluate(label, self.evaluation.num_prompts_during, keep_answers=False)
            self._raise(updates_done, self.alarms.after_evaluation(found))
            await self._keep_best(updates_done, found)
            await self._adapt_share(updates_done, found)
        if updates_done % self.checkpoint.every == 0 or updates_done == self.num_updates:
            await self._save(updates_done, policy_version)
        self._since = time.monotonic()

    def _raise(self, update: int, messages: Sequence[str]) -> None:
        for message in messages:
            self.events.write("alarm", update=update, message=message)
        self.report(alarms=list(self.alarms.raised.values()))

    async def _evaluate(self, label: str, num_prompts: int, *, keep_answers: bool) -> Evaluation:
        start = time.monotonic()
        self.report(activity=f"evaluation {label}")
        evaluation, answers = await self.evaluator.evaluate(label, num_prompts)
        save_evaluation(self.folder.evaluations, evaluation)
        if keep_answers:
            path = self.folder.evaluations / f"{label}-answers.json"
            write_bytes(path, json.dumps(answers, indent=1).encode())
        self.evaluation_s += time.monotonic() - start
        self.events.write("evaluated", label=label, **evaluation.to_dict())
        self.report(activity="training")
        return evaluation

    async def _keep_best(self, updates_done: int, evaluation: Evaluation) -> None:
        metric = self.evaluation.best_metric
        best = self.folder.read_best()
        value = evaluation.value(metric)
        if is_better(metric, value, best["value"] if best else None):
            await asyncio.to_thread(self.save_student, self.folder.best)
            self.folder.write_best({"update": updates_done, "metric": metric, "value": value})
            self.events.write("best", update=updates_done, metric=metric, value=value)

    async def _adapt_share(self, updates_done: int, evaluation: Evaluation) -> None:
        share = self.adaptive_share.after_evaluation(evaluation)
        if share is not None:
            await self.ledger.set_student_share(share)
            self.events.write("student_share", update=updates_done, share=share)

    async def _save(self, updates_done: int, policy_version: int) -> None:
        start = time.monotonic()
        self.report(activity="checkpoint")
        self.metrics.flush()
        state = {
            "updates_done": updates_done,
            "policy_version": policy_version,
            "ledger": await self.ledger.state(),
            "adaptive_share": self.adaptive_share.state(),
            "alarms": self.alarms.state(),
        }
        await asyncio.to_thread(self.checkpoints.save, updates_done, self.tensors(), state)
        # Only now is an acknowledgement final: before, a crash would have undone the update.
        await self.ledger.commit(updates_done)
        self.checkpoint_s += time.monotonic() - start
        self.events.write("checkpoint", updates_done=updates_done)
        self.report(activity="training")
