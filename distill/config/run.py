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
    TrackingConfig,
    WeightsConfig,
)
from distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The sections that one update of the learner reads."""

    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """Texts, losses, horizon and anchor."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critics."""
    credit: CreditConfig = field(default_factory=CreditConfig)
    """The long horizon."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The student's training."""

    @property
    def uses_moment_gap(self) -> bool:
        """Whether a critic's moment gap has weight, in the main loss or as a cost of the long horizon."""
        charged = self.recipe.long_weight > 0 and self.credit.cost == "moment_gap"
        return self.recipe.loss_is_game and (self.recipe.loss_weight > 0 or charged)

    @property
    def learns_critics(self) -> bool:
        """Whether critics are trained, instead of computed in closed form or not used."""
        return self.uses_moment_gap and self.critic.form == "learned"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of `distill train`."""

    run_dir: str = "runs/run"
    """Folder of the run."""
    seed: int = 0
    """Seed of the data order, the sampling and the initial critics."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """Texts, losses, horizon and anchor."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The fixed model."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The trained model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts and references."""
    sft: SftConfig = field(default_factory=SftConfig)
    """Warm start."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """Text sampled from the teacher."""
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    """Replacement for the teacher's probabilities."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling of student text."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """Scoring by the teacher."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """The replay buffer."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critics."""
    credit: CreditConfig = field(default_factory=CreditConfig)
    """The long horizon."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The student's training."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Weight pushes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """State to resume from."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluations on held-out prompts."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Processes of the actors."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Copies of the run's numbers."""

    @property
    def method(self) -> MethodConfig:
        """The sections that an update reads."""
        return MethodConfig(recipe=self.recipe, critic=self.critic, credit=self.credit, learner=self.learner)

    @property
    def max_model_tokens(self) -> int:
        """Length of the longest sequence that an engine can meet, in tokens."""
        return self.data.max_prompt_tokens + max(
            self.rollout.max_new_tokens, self.corpus.max_new_tokens, self.data.max_reference_tokens
        )

    def validate(self) -> None:
        """Raises: ConfigError for the first broken rule."""
        for violation in self.violations():
            raise violation

    def violations(self) -> Iterator[ConfigError]:
        """Every broken rule: first the rules of single sections, then those across sections."""
        yield from bounded("", self, ">= 0", "seed")
        if not self.run_dir:
            yield ConfigError("run_dir", "", "name a folder", "give a path, such as runs/run")
        for part in (getattr(self, section.name) for section in fields(self)):
            if is_dataclass(part):
                yield from part.violations()  # type: ignore[attr-defined]
        yield from self._critic_violations()
        yield from self._credit_violations()
        yield from self._replay_violations()
        yield from self._evaluation_violations()
        yield from self._engine_violations()
        yield from self._deadline_violations()

    def _critic_violations(self) -> Iterator[ConfigError]:
        warmup = self.critic.warmup_updates if self.method.learns_critics else 0
        if warmup >= self.learner.num_updates:
            yield ConfigError(
                "critic.warmup_updates",
                warmup,
                f"be < learner.num_updates ({self.learner.num_updates})",
                "lower it or raise learner.num_updates, because the student is trained only afterwards",
            )
        if self.recipe.teacher_gives == "text" and self.critic.zero_sum:
            yield ConfigError(
                "critic.zero_sum",
                "true",
                "be false when recipe.teacher_gives=text",
                "set it to false, because the penalty needs the teacher's probabilities",
            )

    def _credit_violations(self) -> Iterator[ConfigError]:
        """The long-horizon term has its baseline, its costs and an unbiased correction where one is required."""
        charges = self.recipe.long_weight > 0
        if charges and self.credit.baseline == "leave_one_out" and self.rollout.samples_per_prompt < 2:
            yield ConfigError(
                "rollout.samples_per_prompt",
                self.rollout.samples_per_prompt,
                "be >= 2 when recipe.long_weight > 0 and credit.baseline=leave_one_out",
                "raise it, because the baseline is a mean over the group's other members",
            )
        if charges and self.credit.cost == "moment_gap" and not self.recipe.loss_is_game:
            yield ConfigError(
                "credit.cost",
                "moment_gap",
                "be log_ratio when recipe.long_weight > 0 and recipe.loss is not moment_gap",
                "set it to log_ratio, because such a recipe has no critic",
            )
        if self.credit.form == "exact" and self.recipe.uses_student_text and not self.replay.lock_step:
            if self.credit.ratio != "per_decision":
                yield ConfigError(
                    "credit.ratio",
                    self.credit.ratio,
                    "be per_decision when credit.form=exact and replay.max_policy_age > 0",
                    "set it, because the other corrections of off-policy text are biased; or train in lock-step",
                )
            if self.credit.ratio_max is not None:
                yield ConfigError(
                    "credit.ratio_max",
                    self.credit.ratio_max,
                    "be null when credit.form=exact and replay.max_policy_age > 0",
                    "set it to null, because clipped ratios are biased",
                )

    def _replay_violations(self) -> Iterator[ConfigError]:
        """Student groups reach the learner: settings that would let it wait forever are rejected."""
        if not self.recipe.uses_student_text:
            return
        most = self.learner.prompts_per_update * (self.replay.max_policy_age + 1)
        if self.replay.min_size_to_sample > most:
            yield ConfigError(
                "replay.min_size_to_sample",
                self.replay.min_size_to_sample,
                f"be <= learner.prompts_per_update * (replay.max_policy_age + 1) = {most}",
                "lower it or raise max_policy_age, or the learner waits forever for groups that are not admitted",
            )
        if self.replay.samples_per_insert < 1:
            yield ConfigError(
                "replay.samples_per_insert",
                self.replay.samples_per_insert,
                "be >= 1",
                "set it to 1 to use each group once, because groups that are never used only grow old",
            )

    def _deadline_violations(self) -> Iterator[ConfigError]:
        """An actor that waits for room does not count as one that hangs."""
        if self.checkpoint.wait_for_room_s >= self.cluster.stall_timeout_s:
            yield ConfigError(
                "checkpoint.wait_for_room_s",
                self.checkpoint.wait_for_room_s,
                f"be < cluster.stall_timeout_s ({self.cluster.stall_timeout_s:g})",
                "lower it or raise stall_timeout_s, or an actor that waits is replaced as one that hangs",
            )

    def _evaluation_violations(self) -> Iterator[ConfigError]:
        if self.evaluation.num_prompts > self.data.num_heldout:
            yield ConfigError(
                "evaluation.num_prompts",
                self.evaluation.num_prompts,
                f"be <= data.num_heldout ({self.data.num_heldout})",
                "hold out more rows or evaluate on fewer prompts",
            )
        if self.recipe.adapts_fraction and self.evaluation.every == 0:
            yield ConfigError(
                "evaluation.every",
                0,
                "be >= 1 when recipe.fraction_step > 0",
                "raise it, because evaluations decide when the fraction grows; or set fraction_step=0",
            )

    def _engine_violations(self) -> Iterator[ConfigError]:
        for name in ("rollout", "scoring"):
            engine = getattr(self, name).engine
            if self.cluster.backend == "in_process" and engine != "transformers":
                yield ConfigError(
                    f"{name}.engine",
                    engine,
                    "be transformers when cluster.backend=in_process",
                    "set cluster.backend=ray, because vLLM requires processes of its own",
                )
