"""Settings of the inputs (models, data, teacher text) and of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from distill.config.rules import bounded
from distill.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The fixed model that the student is distilled from."""

    model: str = "smollm2-135m"
    """Folder of a Hugging Face checkpoint, the name of a model that `distill models fetch` offers, or a hub id."""
    revision: str | None = None
    """Revision of a hub id: a branch, tag or commit. null: the hub's default."""

    def violations(self) -> Iterator[ConfigError]:
        if not self.model:
            yield ConfigError(
                "teacher.model", self.model, "name a model", "give a folder, a model's name or a hub id"
            )


@dataclass(frozen=True, kw_only=True)
class StudentInitConfig:
    """A student that is cut from the teacher."""

    source: str | None = None  # `from` in YAML: distill.config.tree.WRITTEN_NAMES
    """``teacher``: the student is the teacher with fewer layers. null: the student is loaded from
    ``student.model``."""
    num_layers: int | None = None
    """Number of the teacher's layers that the student keeps, the first and the last among them."""
    select: Literal["block_influence", "even"] = "block_influence"
    """Which layers are kept. ``block_influence``: those that change their input most, measured with the teacher
    on 30 training texts (Men et al. 2024). ``even``: evenly spaced ones, which damages the student far more."""
    layers: list[int] | None = None
    """The layers to keep, counted from 0, instead of ``num_layers`` and ``select``."""

    @property
    def num_kept(self) -> int:
        """Number of layers of a student that is cut."""
        return self.num_layers or 0 if self.layers is None else len(self.layers)

    def violations(self) -> Iterator[ConfigError]:
        if self.source is None:
            yield from self._violations_of_loaded()
            return
        if self.source != "teacher":
            remedy = "set student.model to start from another checkpoint"
            yield ConfigError("student.init.from", self.source, "be teacher", remedy)
        if self.layers is None and (self.num_layers or 0) < 1:
            yield ConfigError(
                "student.init.num_layers",
                "null" if self.num_layers is None else self.num_layers,
                "be >= 1 when student.init.from is set",
                "set how many of the teacher's layers the student keeps",
            )
        if self.layers is not None:
            yield from self._violations_of_layers(self.layers)

    def _violations_of_loaded(self) -> Iterator[ConfigError]:
        for name in ("num_layers", "layers"):
            if (value := getattr(self, name)) is not None:
                yield ConfigError(
                    f"student.init.{name}",
                    value,
                    "be null unless student.init.from is set",
                    "set it to null, because a loaded student keeps all its layers; or set student.init.from=teacher",
                )

    def _violations_of_layers(self, layers: list[int]) -> Iterator[ConfigError]:
        if self.num_layers is not None:
            remedy = "set one of the two to null"
            yield ConfigError(
                "student.init.num_layers", self.num_layers, "be null when student.init.layers is set", remedy
            )
        if not layers or layers[0] < 0 or any(a >= b for a, b in pairwise(layers)):
            remedy = "list the numbers of the layers to keep in ascending order, from 0"
            yield ConfigError("student.init.layers", layers, "ascend from 0 or more", remedy)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The model that is trained: cut from the teacher, or any causal language model with the teacher's tokenizer."""

    model: str | None = None
    """Folder of a Hugging Face checkpoint, the name of a model that `distill models fetch` offers, or a
    hub id. null: the student is cut from the teacher (``student.init``)."""
    revision: str | None = None
    """Revision of a hub id: a branch, tag or commit. null: the hub's default."""
    init: StudentInitConfig = field(default_factory=StudentInitConfig)
    """How to cut the student from the teacher instead of loading it."""

    def violations(self) -> Iterator[ConfigError]:
        if self.model is None and self.init.source is None:
            yield ConfigError(
                "student.model",
                "null",
                "name a checkpoint unless student.init.from is set",
                "set it, or cut the student from the teacher with student.init.from=teacher student.init.num_layers=N",
            )
        if self.model is not None and self.init.source is not None:
            given = ("num_layers", "layers")
            layers = [f" student.init.{name}=null" for name in given if getattr(self.init, name) is not None]
            yield ConfigError(
                "student.model",
                self.model,
                "be null when student.init.from is set",
                f"to load the student, write student.init.from=null{''.join(layers)}; to cut it from the teacher, "
                "write student.model=null",
            )
        yield from self.init.violations()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts, and the references that answer them."""

    path: str = "alpaca-demo"
    """A file (JSON Lines, JSON, CSV, TSV, Parquet or Arrow, compressed or not), a folder of such files, a pattern
    such as ``data/*.jsonl``, a folder that ``save_to_disk`` wrote, the name of a data set that
    `distill data fetch` offers, or the id of a data set for the `datasets` library."""
    format: Literal["auto", "prompt_completion", "messages", "instruction"] = "auto"
    """Columns of the data: a prompt with its answer; the messages of a conversation; or an instruction, its input
    and the answer. ``auto``: determined from the names of the columns. docs/data.md lists the names."""
    prompt_column: str | None = None
    """The column of the prompts, or of the conversations with ``format=messages``, where it has a name that no
    format knows."""
    answer_column: str | None = None
    """The column of the answers, where it has a name that no format knows."""
    split: str = "train"
    """Split to load, of a `datasets` id, a saved ``DatasetDict`` or a folder. The splits of a folder follow from the
    names of its files; a folder without such names has one split, ``train``."""
    chat_template: bool = True
    """Whether prompts are formatted with the chat template of the teacher's tokenizer; teacher and student
    see the same tokens. false: the prompt's text is used unchanged."""
    num_heldout: int = 128
    """Number of rows that are kept out of training for the evaluations. `seed` determines which ones."""
    max_prompt_tokens: int = 256
    """Longest prompt in tokens, including the chat template."""
    max_reference_tokens: int = 256
    """Number of tokens to which references are truncated."""
    reference_turns: Literal["all", "first"] = "all"
    """Answers of a conversation that are references. ``all``: every answer after the prompt, with the turns between
    them as context. ``first``: only the first answer, for a chat template that changes earlier turns."""
    on_long_prompt: Literal["error", "skip"] = "error"
    """What happens to a prompt that is longer than ``max_prompt_tokens``. ``error``: the run does not start.
    ``skip``: the row is left out and counted."""

    def violations(self) -> Iterator[ConfigError]:
        if not self.path:
            yield ConfigError("data.path", self.path, "name a data set", "give a file, a folder or an id")
        if self.format == "messages" and self.answer_column is not None:
            must, remedy = (
                "be null when data.format=messages",
                "leave it out: the answers are in the messages",
            )
            yield ConfigError("data.answer_column", self.answer_column, must, remedy)
        yield from bounded("data", self, ">= 1", "num_heldout", "max_prompt_tokens", "max_reference_tokens")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Text sampled from the teacher before training. It is stored as Parquet in the cache, and every run with
    the same fingerprint reuses it."""

    num_prompts: int | None = None
    """Number of training prompts that the teacher answers. null: all of them."""
    samples_per_prompt: int = 1
    """Number of answers that the teacher samples for each prompt. With more answers, the student overfits less
    to the text."""
    max_new_tokens: int = 64
    """Longest answer of the teacher, in tokens."""
    seed: int = 0
    """Seed of the sampling. It is part of the fingerprint."""

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
    """Evaluations on held-out prompts before, during and after training."""

    every: int = 10
    """Number of updates between two evaluations during training. 0: evaluate only before and after training."""
    num_prompts: int = 128
    """Number of held-out prompts in the evaluations before and after training."""
    num_prompts_during: int = 32
    """Number of held-out prompts in each evaluation during training."""
    best_metric: str = "teacher_text.tv"
    """Metric by which the evaluations during training select the best student, which is kept. It is
    ``teacher_text.X`` or ``student_text.X``, where X is ``tv``, ``forward_kl``, ``reverse_kl`` or ``jsd``; or
    ``rouge_l.teacher``; or ``rouge_l.reference``."""

    shown_prompts: list[str] | None = None
    """Prompts whose greedy answers the report shows: the teacher's, and the student's before and after training.
    null: the first three held-out prompts."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded(
            "evaluation",
            self,
            ">= 0",
            "every",
            remedy="set it to 0 to evaluate only before and after training",
        )
        yield from bounded(
            "evaluation",
            self,
            ">= 2",
            "num_prompts",
            "num_prompts_during",
            remedy="raise it, because a standard error needs at least two prompts",
        )
        if self.num_prompts_during > self.num_prompts:
            yield ConfigError(
                "evaluation.num_prompts_during",
                self.num_prompts_during,
                f"be <= evaluation.num_prompts ({self.num_prompts})",
                "lower it or raise evaluation.num_prompts",
            )
        if self.shown_prompts == []:
            yield ConfigError(
                "evaluation.shown_prompts",
                "[]",
                "have at least one prompt",
                "leave it out to show the first held-out prompts",
            )
        if self.best_metric not in EVALUATION_METRICS:
            yield ConfigError(
                "evaluation.best_metric",
                self.best_metric,
                f"be one of {', '.join(EVALUATION_METRICS)}",
                did_you_mean(self.best_metric, EVALUATION_METRICS),
            )
