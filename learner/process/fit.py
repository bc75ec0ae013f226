"""Fine-tuning by cross-entropy as a stage of a run: the student's warm start, and a proxy's training.

Wraps :func:`learner.sft.run_sft` with checkpoints, events and the live line. Called by the learner's
shell.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from distill.config import RunConfig, SftConfig
from distill.data import TextCorpus
from distill.machine.hardware import resolve_micro_batch_tokens
from distill.replay.draws import DrawOrder
from distill.run.inputs import RunInputs
from distill.run.metrics import EventLog, ReportFacts
from learner.model.student import Student
from learner.optimizer import adamw, load_optimizer_tensors, optimizer_tensors
from learner.process.checkpoint import CheckpointError, Checkpoints, OtherFormat
from learner.process.student_folder import StudentWriter
from learner.sft import run_sft

CHECKPOINT_EVERY = 10
"""Updates between checkpoints of the stage."""


def fit(
    config: RunConfig,
    inputs: RunInputs,
    model_dir: str,
    corpus_path: str,
    out_dir: Path,
    training: SftConfig,
    report: ReportFacts,
) -> dict[str, float]:
    """Train ``model_dir`` on a corpus into a Hugging Face checkpoint at ``out_dir``.

    Resumes from the stage's own checkpoint where there is one. Returns ``num_tokens``, the last
    ``loss`` and the ``seconds`` of all incarnations.
    """
    learner = config.learner
    student = Student(model_dir, precision=learner.precision, device=learner.device)
    optimizer = adamw(
        student.parameters(), beta1=learner.beta1, beta2=learner.beta2, weight_decay=learner.weight_decay
    )
    corpus = TextCorpus.read(corpus_path)
    checkpoints = Checkpoints(out_dir.with_name(f"{out_dir.name}-checkpoints"), keep=1)
    events = EventLog(config.run_dir)
    done, seconds_before = _resume(checkpoints, student, optimizer, events)
    start = time.monotonic()
    totals = {"num_tokens": 0.0, "loss": 0.0}

    def seconds() -> float:
        return seconds_before + time.monotonic() - start

    def after_update(updates_done: int, metrics: dict[str, float]) -> None:
        totals["num_tokens"] += metrics["sft/num_tokens"]
        totals["loss"] = metrics["sft/loss"]
        report(fit_update=updates_done, fit_loss=metrics["sft/loss"])
        events.write(f"{out_dir.name}_update", update=updates_done, **metrics)
        if updates_done % CHECKPOINT_EVERY == 0 and updates_done < training.num_updates:
            tensors = student.tensors() | optimizer_tensors(optimizer, "optimizer")
            checkpoints.save(updates_done, tensors, {"updates_done": updates_done, "seconds": seconds()})

    run_sft(
        student,
        optimizer,
        corpus.row,
        DrawOrder("teacher_text", corpus.num_rows, config.seed),
        training,
        section="proxy" if out_dir.name == "proxy" else "sft",
        first_update=done,
        micro_batch_tokens=resolve_micro_batch_tokens(learner.micro_batch_tokens, student.device.type),
        vocabulary_chunk=learner.vocabulary_chunk,
        max_grad_norm=learner.max_grad_norm,
        after_update=after_update,
    )
    StudentWriter(inputs, chat_template=config.data.chat_template).write(student, out_dir)
    shutil.rmtree(checkpoints.root, ignore_errors=True)
    events.close()
    return totals | {"seconds": seconds()}


def _resume(
    checkpoints: Checkpoints, student: Student, optimizer: torch.optim.Optimizer, events: EventLog
) -> tuple[int, float]:
    """Load the newest checkpoint; returns the updates that are done, and the seconds they took.

    The stage is short, so it begins anew if the only checkpoint is damaged. Raises: OtherFormat.
    """
    try:
        newest = checkpoints.load_newest()
    except OtherFormat:
        raise
    except CheckpointError as error:
        events.write("checkpoint_damaged", damage=error.statement, used=0)
        shutil.rmtree(checkpoints.root)
        return 0, 0.0
    if newest is None:
        return 0, 0.0
    student.load_tensors(newest.tensors)
    load_optimizer_tensors(optimizer, newest.tensors, "optimizer")
    return newest.state["updates_done"], newest.state["seconds"]
