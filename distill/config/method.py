"""Settings of the method: recipe, critics, the optimisation of the student."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distill.config.rules import rule


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Which text, which loss, which horizon, which anchor: a method is a row of these."""

    name: str = "ammd"
    """What results are called."""
    off_policy_text: Literal["teacher", "reference", "none"] = "teacher"
    """Text the student did not write: the teacher's samples, the data set's references, or none."""
    student_text: Literal["none", "every_update", "mixed"] = "every_update"
    """The student's own text: never, beside the off-policy text in every update, or instead
    of it in a random share ``student_fraction`` of the updates (GKD)."""
    student_fraction: float = 0.5
    """Probability that an update uses student text; only with ``student_text=mixed``."""
    beta: float = 0.25
    """Weight of the on-policy part; the off-policy part weighs 1 - beta. Only with
    ``student_text=every_update``."""
    loss: Literal["moment_gap", "forward_kl", "reverse_kl", "generalized_jsd"] = "moment_gap"
    """Main loss per token. ``moment_gap`` is the adversarial game against learned critics."""
    loss_weight: float = 1.0
    """Weight of the main loss."""
    jsd_beta: float = 0.5
    """Interpolation of the generalised JSD, in (0, 1)."""
    anchor_weight: float = 0.5
    """Weight of forward KL on off-policy text (eta_kl)."""
    lm_weight: float = 0.0
    """Weight of cross-entropy on off-policy text (eta_lm)."""
    long_weight: float = 0.0
    """Weight of the long-horizon policy-gradient term (c_long); 0 turns it off."""
    gamma: float = 0.95
    """Discount per token of the long-horizon term, in (0, 1]."""

    @property
    def uses_critics(self) -> bool:
        return self.loss == "moment_gap"

    @property
    def uses_student_text(self) -> bool:
        """Whether a rollout engine is started."""
        return self.student_text != "none"

    @property
    def payload(self) -> str:
        """Teacher payload that the losses need."""
        return "hidden" if self.loss_weight > 0 or self.anchor_weight > 0 else "text"

    def violations(self) -> Iterator[str]:
        if self.off_policy_text == "none" and self.student_text == "none":
            yield rule(
                "recipe.student_text",
                "none",
                "not be none when recipe.off_policy_text is none",
                "choose a text to learn from",
            )
        if not 0 <= self.beta <= 1:
            yield rule("recipe.beta", self.beta, "lie in [0, 1]", "0.25 is the default")
        if not 0 < self.gamma <= 1:
            yield rule("recipe.gamma", self.gamma, "lie in (0, 1]", "0.95 is the default")
        if not 0 <= self.student_fraction <= 1:
            yield rule("recipe.student_fraction", self.student_fraction, "lie in [0, 1]", "0.5 is GKD's")
        if not 0 < self.jsd_beta < 1:
            yield rule(
                "recipe.jsd_beta",
                self.jsd_beta,
                "lie in (0, 1)",
                "use loss=forward_kl or reverse_kl for the two limits",
            )
        for name in ("loss_weight", "anchor_weight", "lm_weight", "long_weight"):
            if getattr(self, name) < 0:
                yield rule(f"recipe.{name}", getattr(self, name), "be >= 0", "0 turns the term off")
        if self.long_weight > 0 and not (self.uses_critics and self.uses_student_text):
            yield rule(
                "recipe.long_weight",
                self.long_weight,
                "be 0 unless loss=moment_gap and student text is used",
                "the long-horizon term needs a critic on the student's own text",
            )


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The two critics (action-value functions)."""

    features: Literal["ratio", "teacher", "both"] = "ratio"
    """What a critic sees: ``teacher``: the teacher's hidden state and unembedding;
    ``both``: and the student's; ``ratio``: the teacher's and the log-ratio of the policies."""
    rank: int = 64
    """Rank r of the bilinear form."""
    bound: float = 1.0
    """B: |f| <= B."""
    ratio_start: float = 0.5
    """Start of the learned factor s of the log-ratio; 0.5 is the optimum of the regularised game."""
    variance_penalty: float | None = None
    """lambda of (lambda/2) Var_m f, m the mean of the two policies; null: 2/bound."""
    zero_sum: bool = False
    """Whether the student also sees the penalty's gradient."""
    num_steps: int = 3
    """K critic steps per student step, each on its own slice of the batch's positions."""
    learning_rate: float = 1e-3
    """Rate of Adam(0, 0.9)."""
    max_grad_norm: float = 1.0
    """Clipping of the critics' gradient."""
    warmup_updates: int = 0
    """Updates at the start in which only the critics move, in steps of about 512 positions."""

    @property
    def penalty(self) -> float:
        return 2.0 / self.bound if self.variance_penalty is None else self.variance_penalty

    def violations(self) -> Iterator[str]:
        if self.rank < 1:
            yield rule("critic.rank", self.rank, "be >= 1", "64 is the default")
        if self.bound <= 0:
            yield rule("critic.bound", self.bound, "be > 0", "1 is the default")
        if self.num_steps < 1:
            yield rule("critic.num_steps", self.num_steps, "be >= 1", "3 is the default")
        if self.warmup_updates < 0:
            yield rule("critic.warmup_updates", self.warmup_updates, "be >= 0", "0 is the default")


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

    def violations(self) -> Iterator[str]:
        if self.enabled and self.num_updates < 1:
            yield rule(
                "sft.num_updates", self.num_updates, "be >= 1", "to skip the stage set sft.enabled=false"
            )
        if self.rows_per_update < 1:
            yield rule("sft.rows_per_update", self.rows_per_update, "be >= 1", "16 is the default")


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The student's optimisation."""

    num_updates: int = 20
    """Student updates in all."""
    prompts_per_update: int = 16
    """Student groups per update."""
    text_rows_per_update: int = 16
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
    micro_batch_tokens: int = 1024
    """Tokens packed into one forward pass."""
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

    def violations(self) -> Iterator[str]:
        for name in (
            "num_updates",
            "prompts_per_update",
            "text_rows_per_update",
            "micro_batch_tokens",
            "vocabulary_chunk",
        ):
            if getattr(self, name) < 1:
                yield rule(f"learner.{name}", getattr(self, name), "be >= 1", "see docs/configuration.md")
        if self.learning_rate <= 0:
            yield rule("learner.learning_rate", self.learning_rate, "be > 0", "1e-4 is the default")
        if not 0 <= self.warmup_fraction < 1:
            yield rule(
                "learner.warmup_fraction", self.warmup_fraction, "lie in [0, 1)", "0.05 is the default"
            )
