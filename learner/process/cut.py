"""Cutting the student from the teacher as a stage of a run. Called by the learner's shell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from distill.config import RunConfig
from distill.data import read_table
from distill.files import write_json
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs
from learner.model.cut import cut_student, layer_count
from learner.model.depth import block_influence, even_layers, most_influential
from learner.model.student import resolve_device, resolve_precision

NUM_TEXTS = 30
"""Training texts that the influence of the layers is measured on."""
TEXT_TOKENS = 512
"""Tokens of each text that are used."""


@dataclass(frozen=True)
class Choice:
    """Which layers a student keeps, and why. The run folder keeps it."""

    layers: list[int]
    num_teacher_layers: int
    reason: str
    block_influence: list[float] | None = None
    """Per layer of the teacher, where it was measured."""

    def __str__(self) -> str:
        text = f"kept layers {ranges(self.layers)} of 0-{self.num_teacher_layers - 1}, {self.reason}"
        if self.block_influence is None or len(self.layers) == self.num_teacher_layers:
            return text
        removed = [score for layer, score in enumerate(self.block_influence) if layer not in self.layers]
        return f"{text} (of those removed: {min(removed):.3f} to {max(removed):.3f})"


def cut(config: RunConfig, inputs: RunInputs) -> str:
    """Write the student's first checkpoint; returns the choice of its layers in words.

    Raises: ConfigError as :func:`cut_student`.
    """
    choice = _choose(config, inputs)
    # Written first, because a resumed run takes the checkpoint as the sign that all is done.
    write_json(RunFolder(inputs.run_dir).cut_layers, asdict(choice))
    cut_student(inputs.teacher_dir, inputs.student_dir, choice.layers)
    return str(choice)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: ``0-2, 5, 7-9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _choose(config: RunConfig, inputs: RunInputs) -> Choice:
    init, learner = config.student.init, config.learner
    total = layer_count(inputs.teacher_dir)
    if init.layers is not None:
        return Choice(init.layers, total, "as configured")
    if init.select == "even":
        return Choice(even_layers(total, init.num_kept), total, "evenly spaced")
    texts = calibration_texts(inputs.train_prompts)
    device = resolve_device(learner.device)
    precision = resolve_precision(learner.precision, device)
    influence = block_influence(inputs.teacher_dir, texts, device=device, precision=precision)
    kept = most_influential(influence, init.num_kept)
    return Choice(kept, total, f"by block influence on {len(texts)} texts", influence)


def calibration_texts(prompts: str | Path) -> list[list[int]]:
    """Prompts with their references, where they have any, from evenly spaced rows of the training table."""
    table = read_table(prompts)
    rows = np.linspace(0, table.num_rows - 1, min(NUM_TEXTS, table.num_rows)).round().astype(int)
    chosen = table.select(["prompt_tokens", "reference_tokens"]).take(rows).to_pylist()
    return [[*row["prompt_tokens"], *(row["reference_tokens"] or ())][:TEXT_TOKENS] for row in chosen]
