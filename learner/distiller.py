"""The trained state of a run: student, critics, optimizers, and one update of them.

Implements :class:`distill.interfaces.Learner`. A checkpoint contains exactly this state.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from distill.config import RunConfig
from distill.machine.hardware import resolve_micro_batch_tokens
from learner.batch import token_batch
from learner.model.head import Head
from learner.model.student import Student
from learner.optimizer import (
    adamw,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from learner.update.critics import CriticPair, ModelSize
from learner.update.positions import Heads
from learner.update.update import update


class Distiller:
    """Student and critics, trained against a fixed teacher."""

    def __init__(self, config: RunConfig, student: Student, teacher_dir: str | Path) -> None:
        self.config = config
        self.student = student
        self.teacher = Head.from_checkpoint(teacher_dir, device=student.device)
        learner = config.learner
        self.optimizer = adamw(
            student.parameters(), beta1=learner.beta1, beta2=learner.beta2, weight_decay=learner.weight_decay
        )
        self.critics: CriticPair | None = None
        if config.method.learns_critics:
            heads = Heads.of(student, self.teacher)
            sizes = (ModelSize(head.hidden_size, head.num_tokens) for head in (heads.teacher, heads.student))
            self.critics = CriticPair(config.critic, *sizes, seed=config.seed, device=student.device)
        self.updates_done = 0
        self.num_tokens = 0
        """Inputs that the backbone computed since this process started."""

    def update(self, rows: Sequence[pa.RecordBatch]) -> dict[str, float]:
        """Critic steps, then the student step, on the groups of one update."""
        start = time.monotonic()
        config = self.config
        learner = config.learner
        device = self.student.device
        pack_tokens = resolve_micro_batch_tokens(learner.micro_batch_tokens, device.type)
        batch = token_batch(rows, pack_tokens).to(device)
        # The student's updates come after the critics' warm-up, if critics are learned.
        num_warmup = config.critic.warmup_updates if self.critics is not None else 0
        rate = learning_rate(
            max(0, self.updates_done - num_warmup),
            max(1, learner.num_updates - num_warmup),
            learner.learning_rate,
            learner.warmup_fraction,
            learner.final_fraction,
        )
        set_learning_rate(self.optimizer, rate)
        metrics = update(
            self.student,
            self.optimizer,
            batch,
            self.teacher,
            self.critics,
            config.method,
            update_number=self.updates_done,
            warmup=self.updates_done < num_warmup,
        )
        self.updates_done += 1
        self.num_tokens += batch.num_input_tokens
        return (
            metrics
            | _text_metrics(rows)
            | {
                "policy/learning_rate": rate,
                "policy/teacher_text.num_tokens": float(batch.num_teacher_tokens),
                "policy/student_text.num_tokens": float(batch.num_student_tokens),
                "timing/learner_busy_s": time.monotonic() - start,
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        """A copy on the CPU of everything that an update changes, by flat names.

        The next update may begin while a checkpoint writes it.
        """
        critics = self.critics.state_dict() if self.critics is not None else {}
        live = self.student.tensors() | optimizer_tensors(self.optimizer, "optimizer") | critics
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """The inverse of :meth:`tensors`, at ``state["updates_done"]``."""
        self.student.load_tensors(tensors)
        load_optimizer_tensors(self.optimizer, tensors, "optimizer")
        if self.critics is not None:
            self.critics.load_state_dict(tensors)
        self.updates_done = state["updates_done"]


def _text_metrics(batches: Sequence[pa.RecordBatch]) -> dict[str, float]:
    """Mean length of the student's responses in an update, and the share that the limit cut off."""
    lengths: list[int] = []
    truncated = 0
    for batch in batches:
        if batch.column("source")[0].as_py() == "student":
            lengths += np.diff(batch.column("response_tokens").offsets.to_numpy()).tolist()
            truncated += batch.column("finish_reason").to_pylist().count("length")
    if not lengths:
        return {}
    return {
        "policy/response_length": sum(lengths) / len(lengths),
        "policy/truncated_share": truncated / len(lengths),
    }
