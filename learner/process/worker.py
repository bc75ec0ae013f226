"""The learner of a run as a plain class: student, critics, and what the driver wants of them.

Composes the parts of this package; the actor's shell is :class:`learner.process.shell.LearnerActor`. The driver
decides what happens when (:func:`distill.algorithm.train_loop`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distill.config import RunConfig
from distill.evaluation import Evaluation
from distill.interfaces import Lease, SampleRef, WeightManifest
from distill.machine.clock import BusyClock
from distill.machine.hardware import resolve_micro_batch_tokens
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs
from distill.run.store import open_store
from learner.distiller import Distiller
from learner.model.head import Head
from learner.model.student import Student
from learner.process.checkpoint import CheckpointError, Checkpoints, CheckpointWriter
from learner.process.evaluator import Evaluator, PolicyScorer
from learner.process.publish import WeightFile, push_dtype
from learner.process.skips import Skips
from learner.process.student_folder import StudentWriter
from learner.process.teacher_check import check_teacher


class LearnerWorker:
    """One learner rank, at the newest checkpoint of its run.

    Its methods may be called at any time; those that use the model or its device take turns.
    """

    def __init__(self, config: RunConfig, inputs: RunInputs) -> None:
        """Load the models and the newest checkpoint."""
        self.config = config
        self.inputs = inputs
        self.folder = RunFolder(inputs.run_dir)
        student = Student(
            inputs.student_dir, precision=config.learner.precision, device=config.learner.device
        )
        self.distiller = Distiller(config, student, inputs.scoring_dir)
        self.checkpoints = Checkpoints(self.folder.checkpoints, config.checkpoint.keep)
        self.resumed_state: dict[str, Any] | None = None
        """The state of the checkpoint that was loaded, and in ``damaged`` what is wrong with newer ones; None in a new run."""
        newest = self.checkpoints.load_newest()
        if newest is not None:
            self.resumed_state = newest.state | {"damaged": list(newest.damaged)}
            self.distiller.load(newest.tensors, newest.state)
        num_skipped = newest.state.get("num_nonfinite", 0) if newest is not None else 0
        self._skips = Skips(self.distiller, self.folder, inputs.run_id, num_skipped)
        self._policy_version = 0
        self._store = open_store(config, inputs, "learner")
        self._teacher_head = self.distiller.teacher
        """That of the teacher itself, with which evaluations compare also where a proxy stands in for it."""
        if inputs.has_proxy:
            self._teacher_head = Head.from_checkpoint(inputs.teacher_dir, device=student.device)
        self._evaluator = Evaluator(inputs)
        self._copy: Student | None = None
        self._checkpoint_writer = CheckpointWriter(self.checkpoints, self._copied)
        self._students = StudentWriter(inputs, chat_template=config.data.chat_template)
        self._weights = WeightFile(
            student.named_weights, inputs.weights, push_dtype(config), spill_folder=self.folder.replay
        )
        self._turn = asyncio.Lock()
        self._clock = BusyClock()

    async def update(self, lease: Lease) -> dict[str, float]:
        """Train on the groups of a lease; returns the metrics of the update.

        Raises: Diverged when its numbers are not finite and it may not be skipped.
        """
        rows = [self._store.read(sample) for group in lease.groups for sample in group.samples]
        async with self._turn:
            with self._clock.running():
                return await asyncio.to_thread(self._skips.update, rows, self._policy_version)

    def skipped(self, update: int) -> dict[str, Any] | None:
        """Why an update, counted from 1, was skipped, as fields of an event; None if it was not.

        It is known until the next one is skipped.
        """
        newest = self._skips.newest
        return newest if newest is not None and newest["update"] == update else None

    async def write_weights(self, policy_version: int, updates_done: int) -> WeightManifest:
        """Copy the weights into the file of a new version, from which the engines load them."""
        async with self._turn:
            with self._clock.running():
                self._policy_version = policy_version
                return await asyncio.to_thread(self._weights.write, policy_version, updates_done)

    def num_teacher_rows(self) -> int:
        """How much of the teacher's held-out text :meth:`measure` knows."""
        return self._evaluator.num_teacher_rows

    def keep_teacher_text(self, samples: Sequence[SampleRef]) -> None:
        """Keep the teacher's scored text on the first held-out prompts for :meth:`measure`."""
        self._evaluator.keep_teacher_text([self._store.read(sample) for sample in samples])

    async def copy_student(self) -> None:
        """Copy the current student, for :meth:`measure` and :meth:`write_best` while the updates go on."""
        async with self._turn:
            with self._clock.running():
                await asyncio.to_thread(self._copy_student)

    async def measure(self, label: str, samples: Sequence[SampleRef], *, copy: bool = False) -> Evaluation:
        """Measure the current student on its scored samples of the first held-out prompts.

        ``copy``: measure the student that :meth:`copy_student` copied instead, beside the updates.
        """
        rows = [self._store.read(sample) for sample in samples]
        if copy:
            assert self._copy is not None
            return await asyncio.to_thread(self._evaluator.measure, label, rows, self._scorer_of(self._copy))
        async with self._turn:
            with self._clock.running():
                scorer = self._scorer_of(self.distiller.student)
                return await asyncio.to_thread(self._evaluator.measure, label, rows, scorer)

    async def check_teacher(self, samples: Sequence[SampleRef]) -> float:
        """Compare the teacher's engine with the learner on scored held-out text; returns the total variation.

        Raises: ConfigError when the engine's teacher is another distribution than the learner's.
        """
        rows = [self._store.read(sample) for sample in samples]
        head = self._teacher_head.prefix(self.inputs.num_tokens)
        async with self._turn:
            return await asyncio.to_thread(check_teacher, rows, self.inputs.heldout_corpus, head)

    async def save(self, updates_done: int, state: dict[str, Any]) -> float:
        """Write a checkpoint with the driver's ``state``; returns when it is durable.

        The weights are copied first, so that the next update need not wait for the disk. The result is how many
        seconds it had to wait for the copy.

        Raises: CheckpointError when the learner is not at this update; NoSpace, and then the copy is kept, so that the
        same call can be made again although the learner has gone on.
        """
        return await self._checkpoint_writer.save(updates_done, state)

    async def _copied(self, updates_done: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copy what a checkpoint contains. Raises: CheckpointError when the learner is not at this update."""
        async with self._turn:
            if self.distiller.updates_done != updates_done:
                raise CheckpointError(
                    "updates in the learner when its checkpoint is written", self.distiller.updates_done,
                    f"be {updates_done}, as in the ledger of the checkpoint", "report this as a bug",
                )  # fmt: skip
            with self._clock.running():
                tensors = await asyncio.to_thread(self.distiller.tensors)
            return tensors, {"num_nonfinite": self._skips.num_skipped}

    async def write_student(self) -> None:
        """Write the current student as a Hugging Face checkpoint into its folder of the run."""
        async with self._turn:
            await asyncio.to_thread(self._students.write, self.distiller.student, self.folder.student)

    async def write_best(self, best: Mapping[str, Any], *, copy: bool = False) -> None:
        """Write the current student, or the copied one, as the best, with the numbers by which it is."""
        facts = {self.folder.best_numbers.name: best}
        if copy:
            assert self._copy is not None
            await asyncio.to_thread(self._students.write, self._copy, self.folder.best, facts)
            return
        async with self._turn:
            await asyncio.to_thread(self._students.write, self.distiller.student, self.folder.best, facts)

    def stats(self) -> dict[str, float]:
        """Counters for the metrics of an update."""
        return {
            "learner/num_input_tokens": float(self.distiller.num_tokens),
            "timing/learner_total_busy_s": self._clock.busy_s,
        }

    def _copy_student(self) -> None:
        learner = self.config.learner
        if self._copy is None:
            self._copy = Student(self.inputs.student_dir, precision=learner.precision, device=learner.device)
        self._copy.copy_from(self.distiller.student)

    def _scorer_of(self, student: Student) -> PolicyScorer:
        learner = self.config.learner
        micro_batch_tokens = resolve_micro_batch_tokens(learner.micro_batch_tokens, student.device.type)
        return PolicyScorer(student, self._teacher_head, micro_batch_tokens, learner.vocabulary_chunk)
