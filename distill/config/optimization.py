"""Settings of the training of student and proxy: warm start, proxy training, distillation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distill.config.rules import bounded
from distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised warm start: the student is trained by cross-entropy on the references before distillation."""

    enabled: bool = True
    """Whether there is a warm start. false: distillation starts from the student's initial weights."""
    num_updates: int = 30
    """Number of optimizer steps."""
    rows_per_update: int = 16
    """Number of references per optimizer step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW. A cosine lowers it to a tenth of the peak in the last step."""
    warmup_fraction: float = 0.05
    """Fraction of the optimizer steps over which the learning rate rises to its peak."""

    def violations(self) -> Iterator[ConfigError]:
        if self.enabled:
            yield from bounded(
                "sft", self, ">= 1", "num_updates", remedy="set sft.enabled=false to skip the stage"
            )
        yield from _fit_violations("sft", self)


@dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """The language model that replaces the probabilities of a teacher that gives only text
    (``recipe.teacher_gives=text``)."""

    model: str | None = None
    """Folder of a Hugging Face checkpoint, the name of a model that `distill models fetch` offers, or a hub id.
    It must have the student's tokenizer and should be larger than the student. null: the student, as it is
    after its warm start."""
    revision: str | None = None
    """Revision of a hub id: a branch, tag or commit. null: the hub's default."""
    num_updates: int = 300
    """Number of optimizer steps of cross-entropy on teacher text. 0: the model is used unchanged."""
    rows_per_update: int = 16
    """Number of teacher texts per optimizer step."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW. A cosine lowers it to a tenth of the peak in the last step."""
    warmup_fraction: float = 0.05
    """Fraction of the optimizer steps over which the learning rate rises to its peak."""

    @property
    def training(self) -> SftConfig:
        """The training as settings of the warm start, which is the same stage on a different text."""
        return SftConfig(
            num_updates=self.num_updates,
            rows_per_update=self.rows_per_update,
            learning_rate=self.learning_rate,
            warmup_fraction=self.warmup_fraction,
        )

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded(
            "proxy", self, ">= 0", "num_updates", remedy="set it to 0 to use the model unchanged"
        )
        yield from _fit_violations("proxy", self)


def _fit_violations(section: str, part: SftConfig | ProxyConfig) -> Iterator[ConfigError]:
    """The rules that all training by cross-entropy shares."""
    yield from bounded(section, part, ">= 1", "rows_per_update")
    yield from bounded(section, part, "> 0", "learning_rate")
    yield from bounded(section, part, "[0, 1)", "warmup_fraction")


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The distillation: sizes of an update, the student's optimizer, memory and device."""

    num_updates: int = 20
    """Number of updates, including ``critic.warmup_updates``. A resumed run can be given another number; from its
    next update on, the learning rate is that of the schedule over the new number."""
    prompts_per_update: int = 16
    """Number of prompts in an update that the student answers, ``rollout.samples_per_prompt`` times each."""
    teacher_rows_per_update: int = 16
    """Number of rows of teacher text (or references) in an update."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup_fraction: float = 0.05
    """Fraction of the updates over which the learning rate rises to its peak."""
    final_fraction: float = 0.1
    """Learning rate at the end of the cosine schedule, as a fraction of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    beta1: float = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Norm to which the student's gradient is clipped."""
    micro_batch_tokens: int | None = None
    """Number of tokens packed into one forward pass. null: 1,024 on a CPU, 4,096 on a GPU."""
    keep_activations: bool = False
    """Whether the student step reuses the activations of the pass that feeds the critics. This saves one
    backbone pass in four, but memory must hold the activations of a whole update instead of one pack."""
    vocabulary_chunk: int = 256
    """Number of positions whose full-vocabulary rows are in memory at the same time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the computation; master weights are float32. ``auto``: bfloat16 if the processor computes
    in it natively, otherwise float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the learner. ``auto``: the GPU if there is one, otherwise the CPU."""
    num_threads: int | None = None
    """Number of CPU threads. null: as many as the cores that the process may use."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens if a loss, gradient or score of an update is NaN or infinite. The batch is written into the run
    folder in any case, for `distill replay-batch`. ``stop``: the run ends. ``skip``: student and critics stay what they
    were before the update, and the update counts as done."""
    max_nonfinite: int = 10
    """Number of updates that ``learner.on_nonfinite=skip`` may skip in the whole run, resumed or not. One more ends the run.
    They are counted in the run and not in a row, because a run that skips every other update is not healthy either."""

    def violations(self) -> Iterator[ConfigError]:
        counts = ("num_updates", "prompts_per_update", "teacher_rows_per_update", "micro_batch_tokens")
        yield from bounded("learner", self, ">= 1", *counts, "vocabulary_chunk", "num_threads")
        yield from bounded("learner", self, "> 0", "learning_rate", "max_grad_norm")
        yield from bounded("learner", self, ">= 0", "weight_decay", "max_nonfinite")
        yield from bounded("learner", self, "[0, 1)", "warmup_fraction", "beta1", "beta2")
        yield from bounded("learner", self, "[0, 1]", "final_fraction")
