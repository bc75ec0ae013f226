"""The configuration of a run: dataclasses with a meaning and a unit under each field.

Read by every part (each receives its own section), written to ``config.yaml`` in the run
folder. Loading, presets and errors for a mistyped key are in :mod:`distill.config_load`;
the rules here are the ones that need nothing but the numbers. Imports neither torch nor
transformers, so ``distill --help`` and validation are instant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A request that cannot be run: says name, rule, value and remedy in one line."""


def rule(name: str, value: object, must: str, remedy: str) -> str:
    """The one form of every configuration error."""
    return f"{name}={value} must {must}; {remedy}"


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
class TeacherConfig:
    """The fixed model."""

    model: str = "smollm2-135m"
    """Folder of a Hugging Face checkpoint, a name known to `distill models`, or a hub id."""
    revision: str | None = None
    """Hub revision; only for hub ids."""
    trust_remote_code: bool = False
    """Run code that ships with the checkpoint. Off: such a model is refused."""


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

    def violations(self) -> Iterator[str]:
        if (self.model is None) == (self.init.source is None):
            value = "null" if self.model is None else self.model
            yield rule(
                "student.model",
                value,
                "be set exactly when student.init.from is not",
                "give a checkpoint, or student.init: {from: teacher, num_layers: N}",
            )
        if self.init.source not in (None, "teacher"):
            yield rule(
                "student.init.from",
                self.init.source,
                "be teacher",
                "to start from another checkpoint set student.model",
            )
        if self.init.source is not None and (self.init.num_layers or 0) < 1:
            yield rule(
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

    def violations(self) -> Iterator[str]:
        for name in ("num_heldout", "max_prompt_tokens", "max_reference_tokens"):
            if getattr(self, name) < 1:
                yield rule(f"data.{name}", getattr(self, name), "be >= 1", "see docs/configuration.md")


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
class CorpusConfig:
    """Text written once by the teacher, kept as Parquet and re-used by fingerprint."""

    num_prompts: int | None = None
    """Training prompts to answer; null: all that the run draws."""
    max_new_tokens: int = 64
    """Longest response."""
    seed: int = 0
    """Seed of the sampling; part of the fingerprint."""

    def violations(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield rule("corpus.max_new_tokens", self.max_new_tokens, "be >= 1", "64 is the default")
        if self.num_prompts is not None and self.num_prompts < 1:
            yield rule("corpus.num_prompts", self.num_prompts, "be >= 1", "null answers all prompts")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Student text."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What samples. transformers: for machines without vLLM and for tiny models."""
    samples_per_prompt: int = 2
    """Responses per draw: the size of a group."""
    max_new_tokens: int = 64
    """Longest response."""
    temperature: float = 1.0
    """Neutral, always: the method's expectations are over the policy itself."""
    top_p: float = 1.0
    """Neutral, always."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the engine; auto: bfloat16 where the processor computes in it, else float32."""
    tensor_parallel_size: int = 1
    """Ranks that share one copy of the model."""
    num_threads: int | None = None
    """CPU threads; null: all cores of the machine."""
    kv_cache_gib: float = 1.0
    """Key-value cache of the CPU engine, in GiB."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU for weights and cache. Not used on a CPU."""
    max_num_seqs: int = 64
    """Sequences decoded together."""

    def violations(self) -> Iterator[str]:
        if self.samples_per_prompt < 1:
            yield rule("rollout.samples_per_prompt", self.samples_per_prompt, "be >= 1", "2 is the default")
        if self.max_new_tokens < 1:
            yield rule("rollout.max_new_tokens", self.max_new_tokens, "be >= 1", "64 is the default")
        if self.temperature != 1.0:
            yield rule(
                "rollout.temperature",
                self.temperature,
                "be 1",
                "the on-policy distance is an expectation over the policy itself",
            )
        if self.top_p != 1.0:
            yield rule(
                "rollout.top_p",
                self.top_p,
                "be 1",
                "the on-policy distance is an expectation over the policy itself",
            )
        if self.tensor_parallel_size < 1:
            yield rule(
                "rollout.tensor_parallel_size", self.tensor_parallel_size, "be >= 1", "1 is the default"
            )


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Teacher scoring."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What scores."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the engine."""
    tensor_parallel_size: int = 1
    """Ranks that share one copy of the teacher."""
    num_threads: int | None = None
    """CPU threads; null: all cores of the machine."""
    kv_cache_gib: float = 0.5
    """Key-value cache of the CPU engine, in GiB."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU for weights and cache. Not used on a CPU."""
    max_groups: int = 64
    """Groups scored in one call."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The buffer between actors and learner, in Reverb's words."""

    samples_per_insert: float = 1.0
    """How often a student group is used on average."""
    max_times_sampled: int = 1
    """How often a student group may be used. Corpus text has no such bound."""
    min_size_to_sample: int = 0
    """Scored student groups that must be there before one is sampled."""
    max_policy_age: int = 0
    """Bound of a group's age when used, in updates, by its oldest token. 0 is lock-step:
    deterministic, generation and training in turn."""
    memory_bytes: int = 1 << 30
    """Segments kept in shared memory per node; older ones are moved to the run folder."""
    max_bytes: int = 8 << 30
    """Bound of the buffer, shared memory and disk together; corpus payload is evicted over it."""
    segment_bytes: int = 32 << 20
    """A segment file is closed at this size."""

    @property
    def lock_step(self) -> bool:
        return self.max_policy_age == 0

    def violations(self) -> Iterator[str]:
        if self.max_policy_age < 0:
            yield rule("replay.max_policy_age", self.max_policy_age, "be >= 0", "0 is lock-step")
        if self.samples_per_insert <= 0:
            yield rule(
                "replay.samples_per_insert", self.samples_per_insert, "be > 0", "1 uses each group once"
            )
        if self.max_times_sampled < self.samples_per_insert:
            yield rule(
                "replay.max_times_sampled",
                self.max_times_sampled,
                f"be >= replay.samples_per_insert ({self.samples_per_insert})",
                "otherwise groups run out and the learner waits forever; raise it or lower samples_per_insert",
            )
        if self.max_policy_age == 0 and self.samples_per_insert != 1:
            yield rule(
                "replay.samples_per_insert",
                self.samples_per_insert,
                "be 1 when replay.max_policy_age=0",
                "a re-used group is older than 0 updates; raise max_policy_age",
            )
        if self.min_size_to_sample < 0:
            yield rule("replay.min_size_to_sample", self.min_size_to_sample, "be >= 0", "0 is the default")
        if self.segment_bytes < 1 << 12:
            yield rule("replay.segment_bytes", self.segment_bytes, "be >= 4096", "33554432 is the default")
        if self.segment_bytes > self.memory_bytes:
            yield rule(
                "replay.segment_bytes",
                self.segment_bytes,
                f"be <= replay.memory_bytes ({self.memory_bytes})",
                "lower it",
            )
        if self.memory_bytes > self.max_bytes:
            yield rule(
                "replay.memory_bytes",
                self.memory_bytes,
                f"be <= replay.max_bytes ({self.max_bytes})",
                "raise max_bytes or lower memory_bytes",
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
    """Updates at the start in which only the critics move."""

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


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The push of the learner's weights into the engines."""

    backend: Literal["auto", "shared_memory", "nccl", "ipc"] = "auto"
    """auto: shared_memory on CPUs, nccl on GPUs."""
    on_push: Literal["recompute", "keep_kv"] = "recompute"
    """What becomes of requests in flight: their caches are dropped and filled again under the
    new weights, or kept (prefix caching is then off)."""
    deadline_s: float = 120.0
    """A push that takes longer fails the run."""

    def violations(self) -> Iterator[str]:
        if self.deadline_s <= 0:
            yield rule("weights.deadline_s", self.deadline_s, "be > 0", "120 is the default")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Resumable state."""

    every: int = 10
    """Updates between checkpoints; the last update always makes one."""
    keep: int = 2
    """Newest checkpoints kept."""

    def violations(self) -> Iterator[str]:
        if self.every < 1:
            yield rule("checkpoint.every", self.every, "be >= 1", "10 is the default")
        if self.keep < 1:
            yield rule("checkpoint.keep", self.keep, "be >= 1", "2 is the default")


EVALUATION_METRICS = (
    "teacher_text.tv",
    "teacher_text.forward_kl",
    "teacher_text.reverse_kl",
    "student_text.tv",
    "student_text.forward_kl",
    "student_text.reverse_kl",
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

    @property
    def lower_is_better(self) -> bool:
        return not self.best_metric.startswith("rouge_l")

    def violations(self) -> Iterator[str]:
        if self.every < 0:
            yield rule("evaluation.every", self.every, "be >= 0", "0 evaluates only before and after")
        for name in ("num_prompts", "num_prompts_during"):
            if getattr(self, name) < 2:
                yield rule(
                    f"evaluation.{name}", getattr(self, name), "be >= 2", "a standard error needs two prompts"
                )
        if self.num_prompts_during > self.num_prompts:
            yield rule(
                "evaluation.num_prompts_during",
                self.num_prompts_during,
                f"be <= evaluation.num_prompts ({self.num_prompts})",
                "lower it",
            )
        if self.best_metric not in EVALUATION_METRICS:
            yield rule(
                "evaluation.best_metric",
                self.best_metric,
                f"be one of {', '.join(EVALUATION_METRICS)}",
                "choose one of them",
            )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the actors run."""

    address: str | None = None
    """Ray address; null: a local single-node Ray of this run alone."""
    object_store_bytes: int = 128 << 20
    """Object store of a local Ray; rows do not pass through it."""
    start_timeout_s: float = 600.0
    """How long an actor may take to load its model."""

    def violations(self) -> Iterator[str]:
        if self.object_store_bytes < 80 << 20:
            yield rule(
                "cluster.object_store_bytes",
                self.object_store_bytes,
                "be >= 83886080 (Ray's least)",
                "134217728 is the default",
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of `distill train`."""

    run_dir: str = "runs/run"
    """The run folder."""
    seed: int = 0
    """Seed of the data order, the sampling and the initial critics."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """The method."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The fixed model."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The trained model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and references."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Warm start."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The teacher's text."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The student's text."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """Teacher scoring."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """The buffer."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critics."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The optimisation."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """The weight push."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Resumable state."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measurement."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Ray."""

    @property
    def max_model_tokens(self) -> int:
        """Longest sequence that any engine sees."""
        return self.data.max_prompt_tokens + max(
            self.rollout.max_new_tokens, self.corpus.max_new_tokens, self.data.max_reference_tokens
        )

    def violations(self) -> Iterator[str]:
        """Every broken rule, parts first, then the rules across parts."""
        for part in (
            "recipe",
            "student",
            "data",
            "sft",
            "corpus",
            "rollout",
            "replay",
            "critic",
            "learner",
            "weights",
            "checkpoint",
            "evaluation",
            "cluster",
        ):
            yield from getattr(self, part).violations()
        batch = self.learner.prompts_per_update
        bound = batch * (self.replay.max_policy_age + 1)
        if self.recipe.uses_student_text and self.replay.min_size_to_sample > bound:
            yield rule(
                "replay.min_size_to_sample",
                self.replay.min_size_to_sample,
                f"be <= learner.prompts_per_update * (replay.max_policy_age + 1) = {bound}",
                "no more groups are admitted, so the learner would wait forever; lower it or raise max_policy_age",
            )
        if self.recipe.long_weight > 0 and self.rollout.samples_per_prompt < 2:
            yield rule(
                "rollout.samples_per_prompt",
                self.rollout.samples_per_prompt,
                "be >= 2 when recipe.long_weight > 0",
                "the leave-one-out baseline needs another member of the group",
            )
        if self.evaluation.num_prompts > self.data.num_heldout:
            yield rule(
                "evaluation.num_prompts",
                self.evaluation.num_prompts,
                f"be <= data.num_heldout ({self.data.num_heldout})",
                "hold out more rows or evaluate on fewer",
            )
        if self.recipe.uses_student_text and self.replay.samples_per_insert < 1:
            yield rule("replay.samples_per_insert", self.replay.samples_per_insert, "be >= 1",
                       "a group that is never used only grows old; 1 uses each once")  # fmt: skip
        if self.recipe.student_text == "mixed" and self.recipe.off_policy_text == "none":
            yield rule("recipe.off_policy_text", "none", "be teacher or reference when recipe.student_text=mixed",
                       "the updates without student text need another")  # fmt: skip
        if self.recipe.loss == "moment_gap" and self.recipe.student_text == "mixed":
            yield rule(
                "recipe.student_text",
                "mixed",
                "be none or every_update when recipe.loss=moment_gap",
                "both critics need their text in every update",
            )

    def validate(self) -> None:
        """Raises: ConfigError with the first broken rule."""
        for message in self.violations():
            raise ConfigError(message)
