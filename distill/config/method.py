"""Settings of the method: recipe, critics, credit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distill.config.rules import bounded
from distill.errors import ConfigError

Divergence = Literal["forward_kl", "reverse_kl", "generalized_jsd", "skew_forward_kl", "skew_reverse_kl"]
Loss = Literal["moment_gap", Divergence]


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """The choice of texts, losses, horizon and anchor, which defines a method."""

    name: str = "ammd"
    """Name of the recipe in results and reports."""
    teacher_text: Literal["sampled", "reference", "none"] = "sampled"
    """The text that the student did not write. ``sampled``: text sampled from the teacher; ``reference``: the
    data set's references; ``none``: no such text."""
    teacher_gives: Literal["probabilities", "text"] = "probabilities"
    """What the teacher provides. ``probabilities``: its token probabilities. ``text``: only text. A proxy
    language model, trained on that text first (section ``proxy``), then replaces the teacher's probabilities in
    every loss, and the critics learn from the tokens of the text."""
    student_text: Literal["none", "every_update", "mixed"] = "every_update"
    """When an update uses text sampled from the student. ``none``: never; ``every_update``: in every update,
    in addition to the teacher text; ``mixed``: instead of teacher text, in a random share
    (``student_fraction``) of the updates, as in GKD."""
    student_fraction: float = 0.5
    """Probability that an update uses student text. Only used with ``student_text=mixed``."""
    fraction_step: float = 0.0
    """DistiLLM's schedule: the amount by which ``student_fraction`` grows, up to 1, when the validation loss has
    risen. An evaluation during training triggers it if its loss is at least ``fraction_tolerance`` above that of
    the evaluation at the last change. 0: the fraction is fixed."""
    fraction_tolerance: float = 0.1
    """Rise of the validation loss that triggers ``fraction_step``, in nats per token. The validation loss is
    forward KL on held-out teacher text, which differs from cross-entropy by a constant."""
    beta: float = 0.25
    """Weight of the on-policy part of the objective: the main loss and the long-horizon term on student text. The
    off-policy part, the main loss on teacher text, has the weight 1 - beta. Only used if every update contains
    both texts."""
    loss: Loss = "moment_gap"
    """Main loss per token. ``moment_gap``: the adversarial game against critics (``critic.form``); the others
    are divergences between teacher and student."""
    student_text_loss: Loss | None = None
    """Main loss on student text. null: the same as on teacher text. It cannot be combined with ``moment_gap``."""
    loss_weight: float = 1.0
    """Weight of the main loss (c_loss)."""
    jsd_beta: float = 0.5
    """Interpolation weight of the generalised JSD, in (0, 1). 0.5: the symmetric Jensen-Shannon divergence; near
    0 it behaves like forward KL, near 1 like reverse KL."""
    skew: float = 0.1
    """Mixing weight alpha of the skew KLs, in [0, 1): the share of the first distribution in the mixture that
    replaces the second. 0: the plain KL."""
    anchor_weight: float = 0.5
    """Weight of the anchor, a divergence on teacher text that is added to the main loss (eta_kl)."""
    anchor: Divergence = "forward_kl"
    """Divergence of the anchor. An anchor other than forward KL turns the recipe into a strong divergence with a
    critic added to it."""
    lm_weight: float = 0.0
    """Weight of the cross-entropy on teacher text (eta_lm)."""
    long_weight: float = 0.0
    """Weight of the long-horizon policy-gradient term (c_long). 0: no such term."""
    gamma: float = 0.95
    """Discount per token of the long-horizon term, in (0, 1]."""

    @property
    def loss_is_game(self) -> bool:
        """Whether the main loss is a moment gap. :attr:`MethodConfig.uses_moment_gap` adds whether it has weight."""
        return self.loss == "moment_gap"

    @property
    def uses_student_text(self) -> bool:
        """Whether any update uses text sampled from the student."""
        return self.student_text != "none"

    @property
    def adapts_fraction(self) -> bool:
        """Whether the share of student text follows the validation loss."""
        return self.student_text == "mixed" and self.fraction_step > 0

    @property
    def payload(self) -> str:
        """What the losses need of every row: the teacher's hidden states (``hidden``) or only its ``text``."""
        weights = self.loss_weight, self.anchor_weight, self.long_weight
        return "hidden" if max(weights) > 0 else "text"

    def loss_on(self, text: Literal["teacher_text", "student_text"]) -> Loss:
        """The main loss on one of the two texts."""
        return self.student_text_loss or self.loss if text == "student_text" else self.loss

    def violations(self) -> Iterator[ConfigError]:
        yield from self._text_violations()
        yield from self._fraction_violations()
        yield from self._loss_violations()
        yield from self._weight_violations()

    def _text_violations(self) -> Iterator[ConfigError]:
        """Which texts can be combined with each other, with the teacher and with the main loss."""
        if self.teacher_text == "none" and self.student_text == "none":
            yield ConfigError(
                "recipe.student_text",
                "none",
                "not be none when recipe.teacher_text=none",
                "choose a text for the student to learn from",
            )
        if self.teacher_text == "none" and self.student_text == "mixed":
            yield ConfigError(
                "recipe.teacher_text",
                "none",
                "be sampled or reference when recipe.student_text=mixed",
                "choose the text of the updates that use no student text",
            )
        if self.teacher_gives == "text" and self.teacher_text != "sampled":
            yield ConfigError(
                "recipe.teacher_text",
                self.teacher_text,
                "be sampled when recipe.teacher_gives=text",
                "set it to sampled, because the teacher's own text is all that can be learned from",
            )
        if self.teacher_gives == "text" and self.loss_is_game and self.uses_student_text:
            yield ConfigError(
                "recipe.student_text",
                self.student_text,
                "be none when recipe.teacher_gives=text and recipe.loss=moment_gap",
                "set it to none, because such a teacher cannot score what the student wrote",
            )
        if self.loss_is_game and self.student_text == "mixed":
            yield ConfigError(
                "recipe.student_text",
                "mixed",
                "be none or every_update when recipe.loss=moment_gap",
                "choose one of them, because each critic needs its text in every update",
            )

    def _fraction_violations(self) -> Iterator[ConfigError]:
        yield from bounded("recipe", self, "[0, 1]", "student_fraction", remedy="correct it (GKD uses 0.5)")
        yield from bounded("recipe", self, "[0, 1]", "fraction_step", remedy="correct it (DistiLLM uses 0.1)")
        if self.fraction_step > 0 and self.student_text != "mixed":
            yield ConfigError(
                "recipe.fraction_step",
                self.fraction_step,
                "be 0 unless recipe.student_text=mixed",
                "leave it out, because no other recipe has a fraction that could grow",
            )

    def _loss_violations(self) -> Iterator[ConfigError]:
        yield from bounded("recipe", self, "[0, 1]", "beta")
        yield from bounded("recipe", self, "(0, 1]", "gamma")
        yield from bounded(
            "recipe",
            self,
            "(0, 1)",
            "jsd_beta",
            remedy="set recipe.loss to forward_kl or reverse_kl for the two limits",
        )
        yield from bounded(
            "recipe", self, "[0, 1)", "skew", remedy="correct it (DistiLLM uses 0.1; 0 is the plain KL)"
        )
        other = self.student_text_loss
        if other not in (None, self.loss) and "moment_gap" in (self.loss, other):
            yield ConfigError(
                "recipe.student_text_loss",
                other,
                "be null when one of the two losses is moment_gap",
                "leave it out, because the game is played on both texts",
            )

    def _weight_violations(self) -> Iterator[ConfigError]:
        """Weights are not negative, one of them is positive, and a term with weight has its text."""
        weights = ("loss_weight", "anchor_weight", "lm_weight", "long_weight")
        yield from bounded("recipe", self, ">= 0", *weights, remedy="set it to 0 to turn the term off")
        if max(getattr(self, name) for name in weights) == 0:
            yield ConfigError(
                "recipe.loss_weight",
                self.loss_weight,
                "be > 0 when every other weight is 0",
                "give at least one term a weight, or the student learns nothing",
            )
        for name in ("anchor_weight", "lm_weight"):
            if self.teacher_text == "none" and getattr(self, name) > 0:
                yield ConfigError(
                    f"recipe.{name}",
                    getattr(self, name),
                    "be 0 when recipe.teacher_text=none",
                    "set it to 0, or choose a teacher_text, because the term is computed on that text",
                )
        if self.long_weight > 0 and not self.uses_student_text:
            yield ConfigError(
                "recipe.long_weight",
                self.long_weight,
                "be 0 when recipe.student_text=none",
                "set it to 0, or use student text, because the term is an expectation over that text",
            )


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The two critics (action-value functions) of the adversarial game: one for teacher text, one for student
    text."""

    form: Literal["learned", "closed_form", "sign"] = "learned"
    """What the student is trained against. ``learned``: two trained critics. The other two are oracles computed
    from both policies: ``closed_form`` is the optimum of the regularised game, ``sign`` is
    B sign(teacher - student), the best of all bounded critics."""
    features: Literal["ratio", "teacher", "both"] = "ratio"
    """Input of a critic. ``teacher``: the teacher's hidden state and unembedding; ``both``: those of the teacher
    and of the student; ``ratio``: those of the teacher, and the log-ratio of the two policies."""
    rank: int | None = 64
    """Rank r of the bilinear form. null: a dense critic with a separate row for every token, as large as the
    teacher's unembedding, plus its optimizer state."""
    start: Literal["zero", "random"] = "zero"
    """Initial value of the bilinear form. ``random`` with ``learning_rate=0`` is a critic that never learns."""
    bound: float = 1.0
    """Bound B of a critic's values: |f| <= B."""
    ratio_start: float = 0.5
    """Initial value of the learned factor s of the log-ratio. 0.5 is the optimum of the regularised game, where a
    critic stays if ``variance_penalty`` is null and the teacher gives probabilities. Only used with
    ``features=ratio``."""
    variance_penalty: float | None = None
    """Weight lambda of the penalty (lambda/2) Var_m f, where m is the mean of the two policies. null: 2/bound."""
    zero_sum: bool = False
    """Whether the student's loss contains the penalty too."""
    num_steps: int = 3
    """Number K of critic steps per student step. Each uses a different slice of the update's positions."""
    positions_per_step: int | None = None
    """Approximate limit of the positions (response tokens) in a critic step. null: no limit; a step then uses
    a K-th of the update's positions. A low-rank critic learns as well from a few hundred positions, and each
    position costs the logits of both policies."""
    learning_rate: float = 1e-3
    """Learning rate of Adam(0, 0.9). 0: the critics keep their initial values."""
    ema: float = 0.0
    """Decay per critic step of a running mean of the critics, against which the student is trained. 0: the
    student is trained against the newest critics."""
    max_grad_norm: float = 1.0
    """Norm to which the gradient of each critic is clipped."""
    warmup_updates: int = 0
    """Number of updates at the start in which only the critics are trained, in steps of about 512 positions.
    They count towards ``learner.num_updates``; the student's learning rate schedule starts after them."""

    @property
    def penalty(self) -> float:
        """lambda, with its default resolved."""
        return 2.0 / self.bound if self.variance_penalty is None else self.variance_penalty

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("critic", self, ">= 1", "rank", "num_steps", "positions_per_step")
        yield from bounded("critic", self, "> 0", "bound", "variance_penalty", "max_grad_norm")
        yield from bounded("critic", self, ">= 0", "learning_rate", "warmup_updates")
        yield from bounded("critic", self, "[0, 1)", "ema")


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """How the long-horizon term (``recipe.long_weight``) charges a student token for the costs that follow it."""

    form: Literal["practical", "exact"] = "practical"
    """``practical``: losses are means over all tokens with equal weights, and returns are means. ``exact``: the
    gradient of the discounted distance itself. Token t then has the weight gamma^t, sums over responses are
    divided by the number of responses, and returns are plain sums."""
    cost: Literal["moment_gap", "log_ratio"] = "moment_gap"
    """Cost of a token. ``moment_gap``: the critic's moment gap at the state before the token; ``log_ratio``:
    log student - log teacher of the token itself."""
    span: Literal["future", "own", "all"] = "future"
    """Costs that a token is charged for. ``future``: those of later tokens (its own cost is in the direct
    term); ``own``: its own; ``all``: both."""
    cost_scale: float = 1.0
    """Number by which costs are divided."""
    cost_max: float | None = None
    """Absolute value to which costs are clipped. null: no clipping."""
    normalize: Literal["discount", "length", "none"] = "discount"
    """Divisor of a return. ``discount``: the sum of its discounts, which makes the return a mean; ``length``:
    the number of tokens in the span; ``none``: 1. Not used with ``form=exact``, which never divides."""
    baseline: Literal["leave_one_out", "whiten", "none"] = "leave_one_out"
    """Baseline of the returns. ``leave_one_out``: subtract the mean return of the group's other members at the
    same step; ``whiten``: shift and scale all returns of the update to mean 0 and variance 1; ``none``: no
    baseline."""
    ratio: Literal["none", "token", "per_decision"] = "token"
    """Off-policy correction for text sampled from an older policy, with r = student / older policy. ``none``: no
    correction; ``token``: r of the token itself; ``per_decision``: the product of r over the token and all tokens
    before it, with each later cost also multiplied by r of the later tokens it depends on, which is unbiased and
    has the highest variance."""
    ratio_max: float | None = 2.0
    """Value at which ratios are clipped. null: no clipping, and no bias from it."""
    ppo_clip: float | None = None
    """PPO's clip of the ratio to [1 - ppo_clip, 1 + ppo_clip], used instead of ``ratio``. null: no such clip."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("credit", self, "> 0", "cost_scale", "cost_max", "ratio_max", "ppo_clip")
        if self.form == "exact":
            for name in ("cost_max", "ppo_clip"):
                if getattr(self, name) is not None:
                    yield ConfigError(
                        f"credit.{name}",
                        getattr(self, name),
                        "be null when credit.form=exact",
                        "leave it out, because clipping biases the gradient",
                    )
            if self.baseline == "whiten":
                yield ConfigError(
                    "credit.baseline",
                    self.baseline,
                    "not be whiten when credit.form=exact",
                    "choose leave_one_out, which adds no bias",
                )
        if self.ppo_clip is not None and self.ratio == "per_decision":
            yield ConfigError(
                "credit.ppo_clip",
                self.ppo_clip,
                "be null when credit.ratio=per_decision",
                "choose one of the two corrections",
            )
