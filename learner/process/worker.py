"""The learner process: warm start, then training, as a plain class.

Composes the parts of this package for one run; the actor's shell is
:class:`learner.process.shell.LearnerActor`. Other actors are given as objects with the methods of
their workers, local or remote.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from distill.algorithm import train_loop
from distill.config import RunConfig, SftConfig
from distill.data import TextCorpus, read_table
from distill.evaluation import load_evaluation
from distill.machine.hardware import resolve_micro_batch_tokens
from distill.replay.draws import DrawOrder
from distill.replay.segments import SegmentStore
from distill.run.alarms import Alarms
from distill.run.folder import PolicyVersionCounter, RunFolder
from distill.run.inputs import RunInputs
from distill.run.metrics import EventLog, read_metrics
from learner.distiller import Distiller
from learner.model.head import Head
from learner.model.student import Student
from learner.optimizer import adamw, load_optimizer_tensors, optimizer_tensors
from learner.process.adaptive_share import AdaptiveShare
from learner.process.checkpoint import Checkpoints
from learner.process.evaluator import Scorer
from learner.process.milestones import Evaluator, RunMilestones
from learner.process.publish import SharedMemoryPublisher, WeightReceiver
from learner.sft import run_sft

SFT_CHECKPOINT_EVERY = 10
"""Updates between checkpoints of the warm start."""


class LearnerWorker:
    """One learner rank."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.facts: dict[str, Any] = {"activity": "starting"}
        if config.learner.num_threads:
            torch.set_num_threads(config.learner.num_threads)

    def report(self, **facts: Any) -> None:
        """Facts for the live line; whoever shows it polls :attr:`facts`."""
        self.facts |= facts

    # Warm start

    def fit(self, model_dir: str, corpus_path: str, out_dir: str, training: SftConfig) -> dict[str, float]:
        """Cross-entropy on a corpus; writes a Hugging Face checkpoint to ``out_dir``.

        The student's warm start on the references, and a proxy's training on the teacher's text.
        """
        config = self.config
        student = self._student(model_dir)
        learner = config.learner
        optimizer = adamw(
            student.parameters(), beta1=learner.beta1, beta2=learner.beta2, weight_decay=learner.weight_decay
        )
        corpus = TextCorpus.read(corpus_path)
        checkpoints = Checkpoints(Path(out_dir).with_name(f"{Path(out_dir).name}-checkpoints"), keep=1)
        done, seconds_before = _resume_sft(checkpoints, student, optimizer)
        start = time.monotonic()
        totals = {"num_tokens": 0.0, "loss": 0.0}
        events = EventLog(config.run_dir)

        def after_update(updates_done: int, metrics: dict[str, float]) -> None:
            totals["num_tokens"] += metrics["sft/num_tokens"]
            totals["loss"] = metrics["sft/loss"]
            self.report(fit_update=updates_done, fit_loss=metrics["sft/loss"])
            events.write(f"{Path(out_dir).name}_update", update=updates_done, **metrics)
            if updates_done % SFT_CHECKPOINT_EVERY == 0 and updates_done < training.num_updates:
                tensors = {f"student.{name}": value for name, value in student.named_weights()}
                tensors |= optimizer_tensors(optimizer, "optimizer")
                seconds = seconds_before + time.monotonic() - start
                checkpoints.save(updates_done, tensors, {"updates_done": updates_done, "seconds": seconds})

        run_sft(
            student,
            optimizer,
            corpus.rows,
            DrawOrder("teacher_text", corpus.num_rows, config.seed),
            training,
            first_update=done,
            micro_batch_tokens=resolve_micro_batch_tokens(learner.micro_batch_tokens, student.device.type),
            vocabulary_chunk=learner.vocabulary_chunk,
            max_grad_norm=learner.max_grad_norm,
            after_update=after_update,
        )
        _save_whole(student, Path(out_dir))
        shutil.rmtree(checkpoints.root, ignore_errors=True)
        return totals | {"seconds": seconds_before + time.monotonic() - start}

    # Distillation

    def load(self, inputs: RunInputs) -> dict[str, Any] | None:
        """Load models, and the newest checkpoint if there is one; returns its state."""
        self.inputs = inputs
        self.folder = RunFolder(inputs.run_dir)
        self.distiller = Distiller(self.config, self._student(inputs.student_dir), inputs.scoring_dir)
        self.teacher = self.distiller.teacher
        if inputs.has_proxy:
            self.teacher = Head.from_checkpoint(inputs.teacher_dir, device=self.distiller.student.device)
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.config.checkpoint.keep)
        newest = self.checkpoints.latest()
        if newest is None:
            self.adaptive_share = AdaptiveShare(self.config.recipe, self.folder)
            self.alarms = Alarms()
            return None
        tensors, state = self.checkpoints.load(newest)
        self.distiller.load(tensors, state)
        self.adaptive_share = AdaptiveShare(self.config.recipe, self.folder, state["adaptive_share"])
        self.alarms = _resumed_alarms(self.folder, state)
        return state

    async def train(
        self, replay: Any, samplers: Any, receivers: Sequence[WeightReceiver], stage_stats: Any
    ) -> dict[str, Any]:
        """From the loaded state to the last update; returns counters for the summary."""
        config, inputs, folder = self.config, self.inputs, self.folder
        store = SegmentStore(
            memory_dir=inputs.segments,
            spill_dir=folder.replay,
            writer_id="learner",
            node=inputs.node,
            segment_bytes=config.replay.segment_bytes,
            memory_bytes=config.replay.memory_bytes,
        )
        publisher = SharedMemoryPublisher(
            weights=self.distiller.student.named_weights,
            receivers=receivers,
            next_version=PolicyVersionCounter(folder.path).next,
            folder=inputs.weights,
            deadline_s=config.weights.deadline_s,
        )
        milestones = self._milestones(replay, samplers, store, publisher, stage_stats)
        start = time.monotonic()
        self.report(activity="training", num_updates=config.learner.num_updates, started=time.time())
        first = self.distiller.updates_done
        await train_loop(
            replay,
            store,
            self.distiller,
            publisher,
            milestones,
            updates_done=first,
            num_updates=config.learner.num_updates,
        )
        milestones.metrics.close()
        await asyncio.to_thread(_save_whole, self.distiller.student, folder.student)
        return {
            "updates": self.distiller.updates_done,
            "policy_version": PolicyVersionCounter(folder.path).last,
            "num_tokens": self.distiller.num_tokens,
            "timing_s": {
                "training": time.monotonic() - start - milestones.evaluation_s - milestones.checkpoint_s,
                "evaluation": milestones.evaluation_s,
                "checkpoint": milestones.checkpoint_s,
            },
        }

    def _milestones(
        self,
        replay: Any,
        samplers: Any,
        store: SegmentStore,
        publisher: SharedMemoryPublisher,
        stage_stats: Any,
    ) -> RunMilestones:
        config, inputs, student = self.config, self.inputs, self.distiller.student
        tokenizer = AutoTokenizer.from_pretrained(inputs.teacher_dir, local_files_only=True)
        heldout = read_table(inputs.heldout_prompts)
        references = heldout["reference_text"].to_pylist()
        score = Scorer(
            student,
            self.teacher,
            resolve_micro_batch_tokens(config.learner.micro_batch_tokens, student.device.type),
            config.learner.vocabulary_chunk,
        )
        evaluator = Evaluator(
            samplers=samplers,
            store=store,
            score=score,
            decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            prompts=heldout["prompt_text"].to_pylist(),
            references={i: text for i, text in enumerate(references) if text is not None},
        )
        return RunMilestones(
            folder=self.folder,
            evaluator=evaluator,
            ledger=replay,
            checkpoints=self.checkpoints,
            tensors=self.distiller.tensors,
            save_student=lambda path: _save_whole(student, path),
            push_s=lambda: publisher.push_s,
            evaluation=config.evaluation,
            checkpoint=config.checkpoint,
            adaptive_share=self.adaptive_share,
            alarms=self.alarms,
            num_updates=config.learner.num_updates,
            stage_stats=stage_stats,
            report=self.report,
        )

    def _student(self, folder: str) -> Student:
        learner = self.config.learner
        return Student(folder, precision=learner.precision, device=learner.device)


def _resume_sft(
    checkpoints: Checkpoints, student: Student, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Updates that are already done, and the seconds they took."""
    newest = checkpoints.latest()
    if newest is None:
        return 0, 0.0
    tensors, state = checkpoints.load(newest)
    prefix = "student."
    student.load_weights(
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    )
    load_optimizer_tensors(optimizer, tensors, "optimizer")
    return state["updates_done"], state["seconds"]


def _resumed_alarms(folder: RunFolder, state: dict[str, Any]) -> Alarms:
    """From a checkpoint's state, with what the run folder holds of the updates before it."""
    rows = [
        {name: value for name, value in row.items() if value is not None}
        for row in read_metrics(folder.path).to_pylist()
        if row["update"] <= state["updates_done"]
    ]
    label = state["alarms"]["evaluation"]
    return Alarms.resume(state["alarms"], rows, label and load_evaluation(folder.evaluation(label)))


def _save_whole(student: Student, folder: Path) -> None:
    """Write a checkpoint beside its place and rename it, so that it is never half there."""
    new, old = (folder.with_name(f".{folder.name}.{name}") for name in ("new", "old"))
    for left_by_a_crash in (new, old):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    student.save(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
