"""Fine-tuning by cross-entropy on a corpus: the student's warm start, and a proxy's training.

A run resumes from the weights, the optimizer and the number of steps, because the order of the rows is a
function of (seed, step). Called by :mod:`learner.process.fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pyarrow as pa
import torch
from torch import Tensor

from distill.config import SftConfig
from distill.interfaces import Draw
from distill.objectives import cross_entropy
from distill.replay.draws import DrawOrder
from learner.batch import token_batch
from learner.model.chunked import chunked_loss
from learner.model.student import Student
from learner.optimizer import learning_rate, require_finite, set_learning_rate

FINAL_FRACTION = 0.1
"""Learning rate of the last step, as a fraction of the peak."""


def run_sft(
    student: Student,
    optimizer: torch.optim.Optimizer,
    row_of: Callable[[Draw], pa.RecordBatch],
    order: DrawOrder,
    sft: SftConfig,
    *,
    section: Literal["sft", "proxy"],
    first_update: int,
    micro_batch_tokens: int,
    vocabulary_chunk: int,
    max_grad_norm: float,
    after_update: Callable[[int, dict[str, float]], None],
) -> None:
    """Train from ``first_update`` to ``sft.num_updates``.

    ``section``: where the settings are, for errors. ``row_of``: the row of a draw. ``after_update`` is called with
    the number of updates done and ``{"sft/loss", "sft/learning_rate", "sft/num_tokens"}``.

    Raises: Diverged when a loss or gradient is not finite; the model is then that of the last update.
    """
    model = "proxy" if section == "proxy" else "student"
    for update in range(first_update, sft.num_updates):
        first = update * sft.rows_per_update
        draws = [order.draw(number) for number in range(first, first + sft.rows_per_update)]
        batch = token_batch([row_of(draw) for draw in draws], micro_batch_tokens).to(student.device)
        rate = learning_rate(update, sft.num_updates, sft.learning_rate, sft.warmup_fraction, FINAL_FRACTION)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for pack in batch.packs:
            weight = pack.counted.float() / batch.num_teacher_tokens

            def loss_of_chunk(
                where: slice, logits: Tensor, targets: Tensor = pack.targets, weight: Tensor = weight
            ) -> tuple[Tensor, dict[str, Tensor]]:
                losses = cross_entropy(logits.log_softmax(-1), targets[where])
                return (weight[where] * losses).sum(), {}

            loss, _ = chunked_loss(
                student.states(pack), student.head_weight, student.transform, loss_of_chunk, vocabulary_chunk
            )
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)
        require_finite(f"the {model}", total, float(norm), f"{section}.learning_rate")
        optimizer.step()
        metrics = {
            "sft/loss": total,
            "sft/learning_rate": rate,
            "sft/num_tokens": float(batch.num_teacher_tokens),
        }
        after_update(update + 1, metrics)
