"""Times one update of the learner, on random text and random weights of a real model's shape.

    python -m deploy.benchmarks.learner_update --student qwen2.5-0.5b --teacher-width 3584

No model is fetched, because the values of weights do not affect time and memory. The benchmark prints the
tokens per second, the peak of the device's memory, and the share of the time that the arithmetic would take
at ``--peak-tflops``. Compare recipes within one call, because only their ratio carries over to other machines.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from deploy import PRESETS
from deploy.exits import DONE, guarded
from distill.config import RunConfig
from distill.config.load import load_config
from distill.machine.bfloat16 import to_bits
from distill.schema import Trajectory, trajectory_batch, with_teacher_hidden
from learner.distiller import Distiller
from learner.model.student import Student


class Shape(NamedTuple):
    """The sizes that decide how long a student's update takes."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int


SHAPES = {
    "tiny": Shape(64, 2, 128, 2, 1, 1024),
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 49_152),
    "qwen2.5-0.5b": Shape(896, 24, 4864, 14, 2, 151_936),
    "qwen2.5-1.5b": Shape(1536, 28, 8960, 12, 2, 151_936),
    "qwen2.5-3b": Shape(2048, 36, 11_008, 16, 2, 151_936),
}
PROMPT_TOKENS = 128


def save_student(shape: Shape, folder: Path, device: str) -> Path:
    """Save a checkpoint of random weights in bfloat16; returns its folder."""
    config = Qwen2Config(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def save_teacher_head(vocab_size: int, width: int, folder: Path) -> Path:
    """Save the parts of a teacher that the learner reads, its config and its unembedding; returns their folder."""
    folder.mkdir()
    Qwen2Config(hidden_size=width, vocab_size=vocab_size, tie_word_embeddings=False).save_pretrained(folder)
    head = torch.randn(vocab_size, width, dtype=torch.bfloat16) / width**0.5
    save_file({"lm_head.weight": head}, folder / "model.safetensors")
    return folder


def random_group(source: str, number: int, length: int, vocab_size: int, width: int) -> pa.RecordBatch:
    """Draw one text of ``length`` response tokens with its payload."""
    random = np.random.default_rng(number)
    student = source == "student"
    row = Trajectory(
        draw_id=f"{source}/{number}",
        source=source,
        prompt_index=number,
        sample_index=0,
        prompt_tokens=random.integers(0, vocab_size, PROMPT_TOKENS).tolist(),
        response_tokens=random.integers(0, vocab_size, length).tolist(),
        behavior_logprobs=[-10.0] * length if student else None,
        policy_versions=[(0, 1)] if student else None,
        finish_reason="length" if student else None,
        generated_at=datetime.now(UTC) if student else None,
    )
    states = torch.from_numpy(random.normal(size=(length, width)).astype(np.float32))
    return with_teacher_hidden(trajectory_batch([row]), [to_bits(states)])


def update_flops(
    shape: Shape, teacher_width: int, num_inputs: int, num_positions: int, learned: bool
) -> float:
    """Count the floating-point operations that an update requires, without those of attention.

    Backbone: 6 per weight and token. Heads: one forward and two backward products for the student's logits,
    one forward product for the teacher's. With learned critics, the backbone runs forward once more, and both
    heads compute their logits once more. ``teacher_width``: 0 for a recipe that does not use the teacher's states.
    """
    per_layer = shape.hidden_size**2 * (2 + 2 * shape.num_kv_heads / shape.num_heads)
    per_layer += 3 * shape.hidden_size * shape.intermediate_size
    backbone = shape.num_layers * per_layer * num_inputs
    heads = shape.vocab_size * num_positions
    total = 6 * backbone + heads * (6 * shape.hidden_size + 2 * teacher_width)
    if learned:
        total += 2 * backbone + heads * (2 * shape.hidden_size + 2 * teacher_width)
    return total


def measure(
    config: RunConfig, student_dir: Path, teacher_dir: Path, batches: list[pa.RecordBatch], repeats: int
) -> tuple[list[float], float]:
    """Return the seconds of each update after two that warm up, and the peak of memory in GiB."""
    student = Student(student_dir, precision=config.learner.precision, device=config.learner.device)
    learner = Distiller(config, student, teacher_dir)
    on_gpu = student.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        learner.update(batches)  # it reads its metrics back, so the device has finished
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    return seconds[2:], peak


def line(
    config: RunConfig, shape: Shape, teacher_width: int, num_inputs: int, num_positions: int,
    seconds: list[float], peak_gib: float, peak_tflops: float | None,
) -> str:  # fmt: skip
    """Format one measurement."""
    median = float(np.median(seconds))
    text = (
        f"{median * 1e3:.0f} ms an update ({min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}), "
        f"{num_inputs / median:.0f} input tokens/s, peak {peak_gib:.1f} GiB"
    )
    if peak_tflops is None:
        return text
    width = 0 if config.recipe.payload == "text" else teacher_width
    flops = update_flops(shape, width, num_inputs, num_positions, config.method.learns_critics)
    return f"{text}, {100 * flops / (median * peak_tflops * 1e12):.0f} % of the peak"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.benchmarks.learner_update",
        description="Time one update of the learner on random weights of a real shape.",
    )
    parser.add_argument("--student", choices=SHAPES, default="tiny")
    parser.add_argument("--teacher-width", type=int, default=3584, help="hidden size of the teacher")
    parser.add_argument("--recipes", nargs="+", default=["sft", "gkd", "ammd"])
    parser.add_argument(
        "--texts", type=int, default=16, help="number of student texts and of teacher texts in an update"
    )
    parser.add_argument("--length", type=int, default=256, help="response tokens per text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="the device's highest speed in bfloat16")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also print the operators on which the last update spent its time",
    )
    parser.add_argument(
        "--settings",
        action="append",
        help='settings to measure, such as "learner.vocabulary_chunk=512"; repeat the option to compare several',
    )
    return parser.parse_args(arguments)


def _configurations(recipes: Sequence[str], settings: Sequence[str]) -> Iterator[tuple[str, RunConfig]]:
    """Yield each recipe with each of the settings, and a name for the pair. Raises: ConfigError."""
    not_loaded = ["teacher.model=none", "student.model=none", "data.path=none"]
    for recipe, extra in itertools.product(recipes, settings):
        overrides = [*not_loaded, f"recipe={recipe}", *extra.split()]
        yield f"{recipe} {extra}".strip(), load_config(None, overrides, PRESETS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per recipe and settings; returns the exit code."""
    return guarded(_print_all, _options(arguments))


def _print_all(options: argparse.Namespace) -> int:
    configurations = list(_configurations(options.recipes, options.settings or [""]))
    shape, width = SHAPES[options.student], options.teacher_width
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options}")
    with tempfile.TemporaryDirectory() as folder:
        student_dir = save_student(shape, Path(folder) / "student", device)
        teacher_dir = save_teacher_head(shape.vocab_size, width, Path(folder) / "teacher")
        texts = {
            source: [
                random_group(source, number, options.length, shape.vocab_size, width)
                for number in range(options.texts)
            ]
            for source in ("student", "teacher")
        }
        for label, config in configurations:
            batches = [
                *(texts["student"] if config.recipe.uses_student_text else []),
                *(texts["teacher"] if config.recipe.teacher_text != "none" else []),
            ]
            seconds, peak = measure(config, student_dir, teacher_dir, batches, options.repeats)
            positions = len(batches) * options.length
            inputs = positions + len(batches) * (PROMPT_TOKENS - 1)
            found = line(config, shape, width, inputs, positions, seconds, peak, options.peak_tflops)
            print(f"{label}: {found}", flush=True)
            if options.profile:
                _print_profile(config, student_dir, teacher_dir, batches)
    return DONE


def _print_profile(
    config: RunConfig, student_dir: Path, teacher_dir: Path, batches: list[pa.RecordBatch]
) -> None:
    from torch.profiler import ProfilerActivity, profile

    student = Student(student_dir, precision=config.learner.precision, device=config.learner.device)
    learner = Distiller(config, student, teacher_dir)
    learner.update(batches)
    on_gpu = student.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as found:
        learner.update(batches)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=70), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
