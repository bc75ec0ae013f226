"""The learner on a GPU against the same learner on the CPU; skipped where torch sees no GPU.

``python -m pytest tests/gpu`` there. Neither Ray nor vLLM is needed.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distill.machine.bfloat16 import to_bits
from distill.schema import Trajectory, trajectory_batch, with_teacher_hidden
from learner.batch import token_batch
from learner.distiller import Distiller
from learner.model.attention import packed_attention
from learner.model.chunked import chunked_loss
from learner.model.head import LogitTransform
from learner.model.student import Student
from learner.process.checkpoint import Checkpoints
from learner.process.publish import WeightFile
from learner.ranks import Ranks
from learner.update.update import update
from tests.tiny import make_world, tiny_config, tiny_overrides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

AT_THE_OPTIMUM = "critic.learning_rate=1e-6"
"""A ratio-aware critic starts at the best response, where its gradient is rounding alone and Adam makes a
step of full size of it: at the usual rate no two devices agree."""
RECIPES = {
    "ammd": ["recipe=ammd", AT_THE_OPTIMUM],
    "ammd with the long horizon": [
        "recipe=ammd", AT_THE_OPTIMUM, "recipe.long_weight=0.5", "recipe.gamma=0.9",
        "rollout.samples_per_prompt=3",
    ],
    "critics that know the teacher's states alone": ["recipe=ammd", "critic.features=teacher"],
    "ammd_paper": ["recipe=ammd_paper", "rollout.samples_per_prompt=3"],
    "dense critics of both models": ["recipe=ammd", "critic.rank=null", "critic.features=both"],
    "ammd_blackbox": ["recipe=ammd_blackbox"],
    "gkd": ["recipe=gkd"],
    "jsd": ["recipe=jsd"],
    "sft": ["recipe=sft"],
}  # fmt: skip
HIDDEN_SIZE = 64


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    make_world(world)
    return world


def groups(source: str, number: int, rows: int, seed: int) -> list[pa.RecordBatch]:
    """Random texts of 1 to 20 tokens with the states of a teacher that was never asked."""
    random = np.random.default_rng(seed)
    found = []
    for group in range(number):
        texts = [random.integers(2, 258, random.integers(1, 21)) for _ in range(rows)]
        student = source == "student"
        batch = trajectory_batch(
            [
                Trajectory(
                    draw_id=f"{source}/{group}",
                    source=source,
                    prompt_index=group,
                    sample_index=sample,
                    prompt_tokens=random.integers(2, 258, 12),
                    response_tokens=text,
                    behavior_logprobs=[-5.0] * len(text) if student else None,
                    policy_versions=[(0, 1)] if student else None,
                    finish_reason="length" if student else None,
                    generated_at=datetime(2026, 1, 1, tzinfo=UTC) if student else None,
                )
                for sample, text in enumerate(texts)
            ]
        )
        states = [torch.from_numpy(random.normal(size=(len(text), HIDDEN_SIZE))) for text in texts]
        found.append(with_teacher_hidden(batch, [to_bits(s) for s in states]))
    return found


def batches_of(distiller: Distiller, seed: int) -> list[pa.RecordBatch]:
    recipe = distiller.config.recipe
    student = groups("student", 2, 3, seed) if recipe.uses_student_text else []
    text = groups("teacher", 5, 1, 100 + seed) if recipe.teacher_text != "none" else []
    return student + text


def distiller(world: Path, device: str, *overrides: str) -> Distiller:
    config = tiny_config(world, f"learner.device={device}", "learner.num_updates=4", *overrides)
    student = Student(world / "teacher", precision=config.learner.precision, device=device)
    return Distiller(config, student, world / "teacher")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_numbers_are_the_cpus(world: Path, recipe: str) -> None:
    """Float32 on both, two updates."""
    sides = [distiller(world, device, *RECIPES[recipe]) for device in ("cpu", "cuda")]
    for seed in (0, 1):
        found = []
        for side in sides:
            metrics = side.update(batches_of(side, seed))
            found.append({k: v for k, v in metrics.items() if not k.startswith("timing/")})
        for name, value in found[0].items():
            assert found[1][name] == pytest.approx(value, rel=2e-4, abs=2e-4), name


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_of_a_pack_is_each_sequences_own(window: int | None, kv_heads: int) -> None:
    """All sequences in one call of flash attention, against a float32 call each; and the gradients."""
    lengths = (5, 40, 1, 18)
    shapes = [(1, heads, sum(lengths), 32) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device="cuda") for shape in shapes]
    upstream = torch.randn(1, sum(lengths), 4, 32, device="cuda")
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 4 // kv_heads
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        output, _ = packed_attention(
            module, *tensors, None, sequence_lengths=lengths, scaling=0.2, sliding_window=window
        )
        found.append([output, *torch.autograd.grad(output, tensors, upstream.to(dtype))])
    for expected, got in zip(*found, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, atol=0.04, rtol=0.04)


def test_bfloat16_is_near_float32(world: Path) -> None:
    found = []
    for precision in ("float32", "bfloat16"):
        side = distiller(world, "cuda", "recipe=ammd", f"learner.precision={precision}")
        found.append(side.update(batches_of(side, 0)))
    for name in (
        "policy/teacher_text.tv",
        "policy/student_text.tv",
        "policy/student_text.forward_kl",
        "policy/teacher_text.entropy",
        "policy/loss",
    ):
        assert found[1][name] == pytest.approx(found[0][name], rel=0.02), name


def test_kept_activations_change_nothing(world: Path) -> None:
    found = []
    for keep in ("true", "false"):
        side = distiller(world, "cuda", "recipe=ammd", f"learner.keep_activations={keep}")
        found.append(side.update(batches_of(side, 0)))
    for name, value in found[0].items():
        assert name.startswith("timing/") or found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_checkpoint_goes_from_device_to_device(world: Path, tmp_path: Path) -> None:
    on_gpu = distiller(world, "cuda", "recipe=ammd")
    on_gpu.update(batches_of(on_gpu, 0))
    checkpoints = Checkpoints(tmp_path, keep=2)
    folder = checkpoints.save(1, on_gpu.tensors(), {"updates_done": 1})
    for device in ("cpu", "cuda"):
        other = distiller(world, device, "recipe=ammd")
        other.load(*checkpoints.load(folder))
        expected, got = on_gpu.tensors(), other.tensors()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name].cpu(), got[name].cpu()) for name in expected)
        after = [side.update(batches_of(side, 1)) for side in (distiller_like(on_gpu, world), other)]
        assert after[1]["policy/teacher_text.tv"] == pytest.approx(
            after[0]["policy/teacher_text.tv"], rel=1e-3
        )


def distiller_like(side: Distiller, world: Path) -> Distiller:
    copy = distiller(world, "cuda", "recipe=ammd")
    tensors = {name: tensor.clone() for name, tensor in side.tensors().items()}
    copy.load(tensors, {"updates_done": side.updates_done})
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_push_through_shared_memory(world: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    student = Student(world / "teacher", device="cuda")
    manifest = WeightFile(student.named_weights, tmp_path, dtype).write(7, 3)
    received = load_file(manifest.path)
    expected = {name: tensor.cpu().to(dtype) for name, tensor in student.named_weights()}
    assert expected.keys() == received.keys()
    assert all(torch.equal(expected[name], received[name]) for name in expected)


def test_every_sum_over_ranks_is_of_tensors_that_nccl_takes(world: Path) -> None:
    """A group of one: NCCL refuses what lies on the CPU, and the update must be the one without a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        found = []
        for ranks in (Ranks(), Ranks(dist.group.WORLD)):
            side = distiller(world, "cuda", *RECIPES["ammd with the long horizon"])
            batch = token_batch(batches_of(side, 0), 128).to(side.student.device)
            found.append(
                update(
                    side.student, side.optimizer, batch, side.teacher, side.critics, side.config.method,
                    update_number=0, ranks=ranks,
                )
            )  # fmt: skip
    finally:
        dist.destroy_process_group()
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_full_rows_of_the_vocabulary_exist_for_one_chunk() -> None:
    """4,096 positions of 151,936 tokens are 2.5 GB of float32 rows; two chunks of 256 are 0.3."""
    num_positions, vocabulary, width, chunk = 4096, 151_936, 64, 256
    hidden = torch.randn(num_positions, width, device="cuda", requires_grad=True)
    weight = torch.randn(vocabulary, width, device="cuda", requires_grad=True)
    targets = torch.randint(vocabulary, (num_positions,), device="cuda")

    def loss_of_chunk(where: slice, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.nn.functional.cross_entropy(logits, targets[where], reduction="sum"), {}

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = chunked_loss(hidden, weight, LogitTransform(), loss_of_chunk, chunk)
    loss.backward()
    rows = 4 * num_positions * vocabulary
    assert torch.cuda.max_memory_allocated() - before < rows / 2
    assert hidden.grad is not None
    reference = torch.nn.functional.cross_entropy(hidden[:64] @ weight.T, targets[:64], reduction="sum")
    (expected,) = torch.autograd.grad(reference, hidden)
    torch.testing.assert_close(hidden.grad[:64], expected[:64], rtol=1e-4, atol=1e-5)


def test_a_run_in_one_process(world: Path) -> None:
    """Engines on the CPU, the learner on the GPU in bfloat16, from fine-tuning to the last evaluation."""
    overrides = [
        *tiny_overrides(world), f"run_dir={world}/on-gpu", "cluster.backend=in_process",
        "rollout.engine=transformers", "scoring.engine=transformers", "learner.device=cuda",
        "learner.precision=bfloat16", "learner.num_updates=3",
    ]  # fmt: skip
    environment = os.environ | {"DISTILL_CACHE": str(world / "cache")}
    command = [sys.executable, "-m", "deploy.cli.main"]
    done = subprocess.run(
        [*command, "train", str(world / "tiny.yaml"), *overrides],
        env=environment, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    summary = json.loads((world / "on-gpu" / "summary.json").read_text())
    assert summary["updates"] == 3
    for label, text in itertools.product(("before", "after"), ("teacher_text", "student_text")):
        assert 0 < summary[label][text]["tv"] < 1
