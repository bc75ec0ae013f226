"""The configuration of one run, and the rules across its sections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass

from distill.config.inputs import CorpusConfig, DataConfig, EvaluationConfig, StudentConfig, TeacherConfig
from distill.config.method import CreditConfig, CriticConfig, RecipeConfig
from distill.config.optimization import LearnerConfig, ProxyConfig, SftConfig
from distill.config.rules import bounded
from distill.config.runtime import (
    CheckpointConfig,
    ClusterConfig,
    ReplayConfig,
    RolloutConfig,
    ScoringConfig,
    WeightsConfig,
)
from distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The sections that one update of the learner reads."""

    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """Text, loss, horizon, anchor."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critics."""
    credit: CreditConfig = field(default_factory=CreditConfig)
    """The long horizon."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The optimisation."""

    @property
    def uses_moment_gap(self) -> bool:
        """Whether a critic's gaps weigh anything: not in an anchor alone, or in cross-entropy alone."""
        charged = self.recipe.long_weight > 0 and self.credit.cost == "moment_gap"
        return self.recipe.loss_is_game and (self.recipe.loss_weight > 0 or charged)

    @property
    def learns_critics(self) -> bool:
        """Whether there are critics to train: where none is known in closed form."""
        return self.uses_moment_gap and self.critic.form == "learned"


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
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    """Stand-in for the teacher's probabilities."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The student's text."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """Teacher scoring."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """The buffer."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critics."""
    credit: CreditConfig = field(default_factory=CreditConfig)
    """The long horizon."""
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
    def method(self) -> MethodConfig:
        return MethodConfig(recipe=self.recipe, critic=self.critic, credit=self.credit, learner=self.learner)

    @property
    def max_model_tokens(self) -> int:
        """Longest sequence that any engine sees."""
        return self.data.max_prompt_tokens + max(
            self.rollout.max_new_tokens, self.corpus.max_new_tokens, self.data.max_reference_tokens
        )

    def violations(self) -> Iterator[ConfigError]:
        """Every broken rule, parts first, then the rules across parts."""
        yield from bounded("", self, ">= 0", "seed")
        for part in (getattr(self, section.name) for section in fields(self)):
            if is_dataclass(part):
                yield from part.violations()  # type: ignore[attr-defined]
        batch = self.learner.prompts_per_update
        bound = batch * (self.replay.max_policy_age + 1)
        warmup = self.critic.warmup_updates if self.method.learns_critics else 0
        if warmup >= self.learner.num_updates:
            yield ConfigError("critic.warmup_updates", warmup, f"be < learner.num_updates ({self.learner.num_updates})",
                       "the student moves after them; lower it or train for longer")  # fmt: skip
        if self.recipe.uses_student_text and self.replay.min_size_to_sample > bound:
            yield ConfigError(
                "replay.min_size_to_sample",
                self.replay.min_size_to_sample,
                f"be <= learner.prompts_per_update * (replay.max_policy_age + 1) = {bound}",
                "no more groups are admitted, so the learner would wait forever; lower it or raise max_policy_age",
            )
        if self.recipe.long_weight > 0:
            if self.credit.baseline == "leave_one_out" and self.rollout.samples_per_prompt < 2:
                yield ConfigError(
                    "rollout.samples_per_prompt",
                    self.rollout.samples_per_prompt,
                    "be >= 2 when recipe.long_weight > 0 and credit.baseline=leave_one_out",
                    "the baseline needs another member of the group",
                )
            if self.credit.cost == "moment_gap" and not self.recipe.loss_is_game:
                yield ConfigError(
                    "credit.cost",
                    "moment_gap",
                    "be log_ratio when recipe.long_weight > 0 and recipe.loss is not moment_gap",
                    "there is no critic whose gaps could be charged",
                )
        if self.credit.form == "exact" and self.recipe.uses_student_text and self.replay.max_policy_age > 0:
            if self.credit.ratio != "per_decision":
                yield ConfigError("credit.ratio", self.credit.ratio,
                           "be per_decision when credit.form=exact and replay.max_policy_age > 0",
                           "other corrections of stale text are biased; or train in lock-step")  # fmt: skip
            if self.credit.ratio_max is not None:
                yield ConfigError("credit.ratio_max", self.credit.ratio_max,
                           "be null when credit.form=exact and replay.max_policy_age > 0",
                           "cut ratios are biased")  # fmt: skip
        if self.recipe.teacher_gives == "text" and self.critic.zero_sum:
            yield ConfigError("critic.zero_sum", True, "be false when recipe.teacher_gives=text",
                       "the penalty's centre is the teacher's, which is not known")  # fmt: skip
        if self.cluster.backend == "in_process":
            for name in ("rollout", "scoring"):
                if getattr(self, name).engine != "transformers":
                    yield ConfigError(
                        f"{name}.engine",
                        getattr(self, name).engine,
                        "be transformers when cluster.backend=in_process",
                        "vLLM wants processes of its own; use cluster.backend=ray",
                    )
        if self.evaluation.num_prompts > self.data.num_heldout:
            yield ConfigError(
                "evaluation.num_prompts",
                self.evaluation.num_prompts,
                f"be <= data.num_heldout ({self.data.num_heldout})",
                "hold out more rows or evaluate on fewer",
            )
        if self.recipe.uses_student_text and self.replay.samples_per_insert < 1:
            yield ConfigError("replay.samples_per_insert", self.replay.samples_per_insert, "be >= 1",
                       "a group that is never used only grows old; 1 uses each once")  # fmt: skip
        if self.recipe.student_text == "mixed" and self.recipe.teacher_text == "none":
            yield ConfigError("recipe.teacher_text", "none", "be sampled or reference when recipe.student_text=mixed",
                       "the updates without student text need another")  # fmt: skip
        if self.recipe.adapts_fraction and self.evaluation.every == 0:
            yield ConfigError("evaluation.every", 0, "be >= 1 when recipe.fraction_step > 0",
                       "the share of student text follows the evaluations; set fraction_step=0 to fix it")  # fmt: skip
        if self.recipe.loss == "moment_gap" and self.recipe.student_text == "mixed":
            yield ConfigError(
                "recipe.student_text",
                "mixed",
                "be none or every_update when recipe.loss=moment_gap",
                "both critics need their text in every update",
            )

    def validate(self) -> None:
        """Raises: ConfigError with the first broken rule."""
        for violation in self.violations():
            raise violation
