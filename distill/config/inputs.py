"""Settings of what goes in: models, data, the teacher's text; and of what is measured of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from distill.config.rules import bounded
from distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The fixed model."""

    model: str = "smollm2-135m"
    """Folder of a Hugging Face checkpoint, a name known to `distill models`, or a hub id."""
    revision: str | None = None
    """Hub revision; only for hub ids."""

    def violations(self) -> Iterator[ConfigError]:
        if not self.model:
            yield ConfigError(
                "teacher.model", self.model, "name a model", "give a folder, a name or a hub id"
            )


@dataclass(frozen=True, kw_only=True)
class StudentInitConfig:
    """A student cut from a bigger model."""

    source: str | None = None
    """``teacher``: cut from the teacher; null: load ``student.model``. Written ``from`` in YAML."""
    num_layers: int | None = None
    """Layers kept, evenly spaced, first and last among them."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The trained model: cut from the teacher, or any causal LM of its tokenizer."""

    model: str | None = None
    """Folder of a Hugging Face checkpoint, a name known to `distill models`, or a hub id."""
    revision: str | None = None
    """Hub revision; only for hub ids."""
    init: StudentInitConfig = field(default_factory=StudentInitConfig)
    """How to cut the student from the teacher instead of loading one."""

    def violations(self) -> Iterator[ConfigError]:
        if (self.model is None) == (self.init.source is None):
            value = "null" if self.model is None else self.model
            yield ConfigError(
                "student.model",
                value,
                "be set exactly when student.init.from is not",
                "give a checkpoint, or student.init: {from: teacher, num_layers: N}",
            )
        if self.init.source not in (None, "teacher"):
            yield ConfigError(
                "student.init.from",
                self.init.source,
                "be teacher",
                "to start from another checkpoint set student.model",
            )
        if self.init.source is None and self.init.num_layers is not None:
            yield ConfigError(
                "student.init.num_layers",
                self.init.num_layers,
                "be null unless student.init.from is set",
                "a student of its own keeps its layers; to cut one from the teacher set student.init.from=teacher",
            )
        if self.init.source is not None and (self.init.num_layers or 0) < 1:
            yield ConfigError(
                "student.init.num_layers",
                self.init.num_layers,
                "be >= 1",
                "say how many of the teacher's layers to keep",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts and references."""

    path: str = "alpaca-demo"
    """A .jsonl, .json or .parquet file, a name known to `distill data`, or a `datasets` id."""
    format: Literal["auto", "prompt_completion", "messages", "instruction"] = "auto"
    """Columns: prompt/completion, messages, or instruction/input/output. auto looks at the first row."""
    split: str = "train"
    """Split of a `datasets` id."""
    chat_template: bool = True
    """Apply the teacher tokenizer's chat template (both models see the same tokens);
    false: the prompt's text as it is."""
    num_heldout: int = 128
    """Rows kept out of training, for evaluation; chosen by `seed`."""
    max_prompt_tokens: int = 256
    """Longest prompt, template included."""
    max_reference_tokens: int = 256
    """References are cut to this many tokens."""
    on_long_prompt: Literal["error", "skip"] = "error"
    """A prompt over the limit stops the run, or is left out and counted."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("data", self, ">= 1", "num_heldout", "max_prompt_tokens", "max_reference_tokens")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Text written once by the teacher, kept as Parquet and re-used by fingerprint."""

    num_prompts: int | None = None
    """Training prompts to answer; null: all that the run draws."""
    samples_per_prompt: int = 1
    """Answers to each prompt. The cheaper the teacher's text, the less a student overfits to it."""
    max_new_tokens: int = 64
    """Longest response."""
    seed: int = 0
    """Seed of the sampling; part of the fingerprint."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("corpus", self, ">= 1", "max_new_tokens", "samples_per_prompt", "num_prompts")
        yield from bounded("corpus", self, ">= 0", "seed")


EVALUATION_METRICS = (
    "teacher_text.tv",
    "teacher_text.forward_kl",
    "teacher_text.reverse_kl",
    "teacher_text.jsd",
    "student_text.tv",
    "student_text.forward_kl",
    "student_text.reverse_kl",
    "student_text.jsd",
    "rouge_l.teacher",
    "rouge_l.reference",
)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out measurement before, during and after."""

    every: int = 10
    """Updates between evaluations during training; 0: only before and after."""
    num_prompts: int = 128
    """Held-out prompts before and after."""
    num_prompts_during: int = 32
    """Held-out prompts of an evaluation during training."""
    best_metric: str = "teacher_text.tv"
    """Which value of an evaluation during training names the best checkpoint."""

    def violations(self) -> Iterator[ConfigError]:
        if self.every < 0:
            yield ConfigError("evaluation.every", self.every, "be >= 0", "0 evaluates only before and after")
        for name in ("num_prompts", "num_prompts_during"):
            if getattr(self, name) < 2:
                yield ConfigError(
                    f"evaluation.{name}", getattr(self, name), "be >= 2", "a standard error needs two prompts"
                )
        if self.num_prompts_during > self.num_prompts:
            yield ConfigError(
                "evaluation.num_prompts_during",
                self.num_prompts_during,
                f"be <= evaluation.num_prompts ({self.num_prompts})",
                "lower it",
            )
        if self.best_metric not in EVALUATION_METRICS:
            yield ConfigError(
                "evaluation.best_metric",
                self.best_metric,
                f"be one of {', '.join(EVALUATION_METRICS)}",
                "choose one of them",
            )
