"""Fine-tuning: a gradient that is not finite must not reach the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest
import torch

from distill.config import SftConfig
from distill.errors import Diverged
from distill.interfaces import Draw
from distill.replay.draws import DrawOrder
from distill.schema import Trajectory, trajectory_batch
from learner.model.student import Student
from learner.optimizer import adamw
from learner.sft import run_sft
from tests.tiny import save_tiny_llama


def row_of(draw: Draw) -> pa.RecordBatch:
    return trajectory_batch(
        [
            Trajectory(
                draw_id=draw.draw_id, source="reference", prompt_index=draw.index, sample_index=0,
                prompt_tokens=[5, 6], response_tokens=[7, 8 + draw.index],
            )
        ]
    )  # fmt: skip


@pytest.mark.parametrize(("section", "model"), [("sft", "student"), ("proxy", "proxy")])
def test_a_gradient_that_is_not_finite_ends_the_training(
    tmp_path: Path, section: Literal["sft", "proxy"], model: str
) -> None:
    student = Student(save_tiny_llama(tmp_path), precision="float32", device="cpu")
    done: list[int] = []
    before: dict[str, torch.Tensor] = {}

    def after_update(updates_done: int, metrics: dict[str, float]) -> None:
        done.append(updates_done)
        if updates_done == 2:
            with torch.no_grad():
                student.model.model.norm.weight[0] = torch.inf
            before.update({name: tensor.clone() for name, tensor in student.named_weights()})

    with pytest.raises(
        Diverged,
        match=rf"^the {model}'s loss and gradient norm=nan, nan must be finite; lower {section}\.learning_rate; ",
    ):
        run_sft(
            student,
            adamw(student.parameters(), beta1=0.9, beta2=0.95, weight_decay=0.0),
            row_of,
            DrawOrder("teacher_text", 6, seed=0),
            SftConfig(num_updates=5, rows_per_update=2),
            section=section,
            first_update=0,
            micro_batch_tokens=16,
            vocabulary_chunk=8,
            max_grad_norm=1.0,
            after_update=after_update,
        )
    assert done == [1, 2]
    for name, tensor in student.named_weights():
        assert torch.equal(tensor, before[name]), name
