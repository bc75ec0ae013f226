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
from distill.errors import Diverged
from distill.machine.hardware import resolve_micro_batch_tokens
from learner.batch import TokenBatch, token_batch
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

    def __init__(self, config: RunConfig, student: Student, teacher: str | Path | Head) -> None:
        """``teacher``: its checkpoint, or its head on the student's device."""
        self.config = config
        self.student = student
        if not isinstance(teacher, Head):
            teacher = Head.from_checkpoint(teacher, device=student.device)
        self.teacher = teacher
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
        """Critic steps, then the student step, on the groups of one update.

        Raises: Diverged, as :meth:`train_on`.
        """
        start = time.monotonic()
        batch = self.batch(rows)
        metrics = self.train_on(batch)
        self.updates_done += 1
        return metrics | self._facts(rows, batch) | {"timing/learner_busy_s": time.monotonic() - start}

    def skip(self, rows: Sequence[pa.RecordBatch]) -> dict[str, float]:
        """Count an update that failed as done, so that its draws are used and its place in the schedules has passed."""
        self.updates_done += 1
        return self._facts(rows, self.batch(rows))

    def batch(self, rows: Sequence[pa.RecordBatch]) -> TokenBatch:
        """Pack the rows of an update, on the learner's device."""
        device = self.student.device
        pack_tokens = resolve_micro_batch_tokens(self.config.learner.micro_batch_tokens, device.type)
        return token_batch(rows, pack_tokens).to(device)

    def _facts(self, rows: Sequence[pa.RecordBatch], batch: TokenBatch) -> dict[str, float]:
        """The metrics of an update's texts."""
        self.num_tokens += batch.num_input_tokens
        return _text_metrics(rows) | {
            "policy/teacher_text.num_tokens": float(batch.num_teacher_tokens),
            "policy/student_text.num_tokens": float(batch.num_student_tokens),
        }

    def train_on(self, batch: TokenBatch) -> dict[str, float]:
        """Change student and critics by one update, without counting it.

        The critics are copied before, and a failed update puts the copy back. It is on their device and as large as they and
        Adam's state are: 1 MB of low rank, and with ``critic.rank`` null what a checkpoint has of them.

        Raises: Diverged when a score, loss or gradient is not finite; student, critics and both optimizers are
        then, to the last bit, what they were before.
        """
        config = self.config
        learner = config.learner
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
        critics = self.critics.copy() if self.critics is not None else {}
        try:
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
        except Diverged:
            self.optimizer.zero_grad(set_to_none=True)
            if self.critics is not None:
                self.critics.zero_grad()
                self.critics.load_state_dict(critics)
            raise
        return metrics | {"policy/learning_rate": rate}

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
