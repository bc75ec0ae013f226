"""Settings of the student's optimisation: warm start, updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distill.config.rules import bounded
from distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Warm start of the student by cross-entropy on the references."""

    enabled: bool = True
    """False: the student starts as it is."""
    num_updates: int = 30
    """Optimiser steps."""
    rows_per_update: int = 16
    """References per step."""
    learning_rate: float = 5e-4
    """Peak rate of AdamW."""
    warmup_fraction: float = 0.05
    """Share of the steps with a rising rate."""

    def violations(self) -> Iterator[ConfigError]:
        if self.enabled and self.num_updates < 1:
            yield ConfigError(
                "sft.num_updates", self.num_updates, "be >= 1", "to skip the stage set sft.enabled=false"
            )
        yield from bounded("sft", self, ">= 1", "rows_per_update")
        yield from bounded("sft", self, "> 0", "learning_rate")
        yield from bounded("sft", self, "[0, 1)", "warmup_fraction")


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """The language model that stands in for a teacher without probabilities (``recipe.teacher_gives=text``)."""

    model: str | None = None
    """Folder of a Hugging Face checkpoint, a name known to `distill models`, or a hub id, of the
    student's tokenizer; best larger than the student. null: the student's own start."""
    revision: str | None = None
    """Hub revision; only for hub ids."""
    num_updates: int = 300
    """Optimiser steps of cross-entropy on the teacher's text; 0: as it is."""
    rows_per_update: int = 16
    """Texts per step."""
    learning_rate: float = 5e-4
    """Peak rate of AdamW."""
    warmup_fraction: float = 0.05
    """Share of the steps with a rising rate."""

    @property
    def training(self) -> SftConfig:
        """The same stage as the student's warm start, on another text."""
        return SftConfig(
            num_updates=self.num_updates,
            rows_per_update=self.rows_per_update,
            learning_rate=self.learning_rate,
            warmup_fraction=self.warmup_fraction,
        )

    def violations(self) -> Iterator[ConfigError]:
        if self.num_updates < 0:
            yield ConfigError("proxy.num_updates", self.num_updates, "be >= 0", "0 takes the model as it is")
        yield from bounded("proxy", self, ">= 1", "rows_per_update")
        yield from bounded("proxy", self, "> 0", "learning_rate")
        yield from bounded("proxy", self, "[0, 1)", "warmup_fraction")


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The student's optimisation."""

    num_updates: int = 20
    """Student updates in all."""
    prompts_per_update: int = 16
    """Student groups per update."""
    teacher_rows_per_update: int = 16
    """Corpus rows per update."""
    learning_rate: float = 1e-4
    """Peak rate of AdamW."""
    warmup_fraction: float = 0.05
    """Share of the updates with a rising rate."""
    final_fraction: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled decay of AdamW."""
    beta1: float = 0.9
    """First moment of AdamW."""
    beta2: float = 0.95
    """Second moment of AdamW."""
    max_grad_norm: float = 1.0
    """Clipping of the student's gradient."""
    micro_batch_tokens: int | None = None
    """Tokens packed into one forward pass; null: 1,024 on a CPU, 4,096 on a GPU."""
    keep_activations: bool = False
    """Keep the activations that the critics' pass computed for the student's step: one backbone
    pass in four is saved, and memory holds a whole update's activations instead of one pack's."""
    vocabulary_chunk: int = 256
    """Positions whose full-vocabulary rows exist at one time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute format; master weights are float32. auto: bfloat16 where the processor computes in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner runs."""
    num_threads: int | None = None
    """CPU threads; null: all cores of the machine."""

    def violations(self) -> Iterator[ConfigError]:
        counts = ("num_updates", "prompts_per_update", "teacher_rows_per_update", "micro_batch_tokens")
        yield from bounded("learner", self, ">= 1", *counts, "vocabulary_chunk", "num_threads")
        yield from bounded("learner", self, "> 0", "learning_rate", "max_grad_norm")
        yield from bounded("learner", self, ">= 0", "weight_decay")
        yield from bounded("learner", self, "[0, 1)", "warmup_fraction", "beta1", "beta2")
        yield from bounded("learner", self, "[0, 1]", "final_fraction")
