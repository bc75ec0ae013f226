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
    """Which text, which loss, which horizon, which anchor: a method is a row of these."""

    name: str = "ammd"
    """What results are called."""
    teacher_text: Literal["sampled", "reference", "none"] = "sampled"
    """Text the student did not write: the teacher's samples, the data set's references, or none."""
    teacher_gives: Literal["probabilities", "text"] = "probabilities"
    """``text``: the teacher gives text and no probabilities; a proxy language model, trained on that
    text first (``proxy``), stands in for them in every loss, and the critics learn from the text's
    tokens."""
    student_text: Literal["none", "every_update", "mixed"] = "every_update"
    """The student's own text: never, beside the off-policy text in every update, or instead
    of it in a random share ``student_fraction`` of the updates (GKD)."""
    student_fraction: float = 0.5
    """Probability that an update uses student text; only with ``student_text=mixed``."""
    fraction_step: float = 0.0
    """Added to the share, up to 1, when an evaluation during training finds forward KL on the teacher's
    text at least ``fraction_tolerance`` above where the share was set last (DistiLLM); 0: fixed."""
    fraction_tolerance: float = 0.1
    """Nats per token; the validation loss is forward KL up to a constant."""
    beta: float = 0.25
    """Weight of the on-policy part; the off-policy part weighs 1 - beta. Only with
    ``student_text=every_update``."""
    loss: Loss = "moment_gap"
    """Main loss per token. ``moment_gap`` is the game against critics (see ``critic.form``)."""
    student_text_loss: Loss | None = None
    """Main loss on student text where it is another one; null: the same. Not with critics."""
    loss_weight: float = 1.0
    """Weight of the main loss."""
    jsd_beta: float = 0.5
    """Interpolation of the generalised JSD, in (0, 1)."""
    skew: float = 0.1
    """alpha of the skew KLs, in [0, 1): how much of the first policy the second one is mixed with."""
    anchor_weight: float = 0.5
    """Weight of the anchor, a divergence on off-policy text beside the main loss (eta_kl)."""
    anchor: Divergence = "forward_kl"
    """Which divergence that is; another one than forward KL is a strong recipe with a critic beside it."""
    lm_weight: float = 0.0
    """Weight of cross-entropy on off-policy text (eta_lm)."""
    long_weight: float = 0.0
    """Weight of the long-horizon policy-gradient term (c_long); 0 turns it off."""
    gamma: float = 0.95
    """Discount per token of the long-horizon term, in (0, 1]."""

    @property
    def loss_is_game(self) -> bool:
        """Whether the main loss is a critic's gap; whether it weighs anything: :attr:`MethodConfig.uses_moment_gap`."""
        return self.loss == "moment_gap"

    @property
    def uses_student_text(self) -> bool:
        """Whether a rollout engine is started."""
        return self.student_text != "none"

    @property
    def adapts_fraction(self) -> bool:
        """Whether the share of student text follows the validation loss."""
        return self.student_text == "mixed" and self.fraction_step > 0

    @property
    def payload(self) -> str:
        """Teacher payload that the losses need."""
        weights = self.loss_weight, self.anchor_weight, self.long_weight
        return "hidden" if max(weights) > 0 else "text"

    def loss_on(self, source: Literal["teacher_text", "student_text"]) -> Loss:
        """Main loss on other text or on the student's own."""
        return self.student_text_loss or self.loss if source == "student_text" else self.loss

    def violations(self) -> Iterator[ConfigError]:
        if self.teacher_text == "none" and self.student_text == "none":
            yield ConfigError(
                "recipe.student_text",
                "none",
                "not be none when recipe.teacher_text is none",
                "choose a text to learn from",
            )
        if self.teacher_gives == "text":
            if self.teacher_text != "sampled":
                yield ConfigError("recipe.teacher_text", self.teacher_text, "be sampled when recipe.teacher_gives=text",
                           "its text is all there is to learn from")  # fmt: skip
            if self.loss_is_game and self.uses_student_text:
                yield ConfigError("recipe.student_text", self.student_text,
                           "be none when recipe.teacher_gives=text and recipe.loss=moment_gap",
                           "no teacher says what it would have written after the student's text")  # fmt: skip
        yield from bounded("recipe", self, "[0, 1]", "beta")
        yield from bounded("recipe", self, "(0, 1]", "gamma")
        if not 0 <= self.student_fraction <= 1:
            yield ConfigError(
                "recipe.student_fraction", self.student_fraction, "lie in [0, 1]", "0.5 is GKD's"
            )
        if not 0 <= self.fraction_step <= 1:
            yield ConfigError(
                "recipe.fraction_step", self.fraction_step, "lie in [0, 1]", "0.1 is DistiLLM's"
            )
        if self.fraction_step > 0 and self.student_text != "mixed":
            yield ConfigError("recipe.fraction_step", self.fraction_step, "be 0 unless recipe.student_text=mixed",
                       "no share is drawn otherwise")  # fmt: skip
        if not 0 < self.jsd_beta < 1:
            yield ConfigError(
                "recipe.jsd_beta",
                self.jsd_beta,
                "lie in (0, 1)",
                "use loss=forward_kl or reverse_kl for the two limits",
            )
        if not 0 <= self.skew < 1:
            yield ConfigError(
                "recipe.skew", self.skew, "lie in [0, 1)", "0.1 is DistiLLM's; 0 is the plain KL"
            )
        if "moment_gap" in (
            self.loss,
            self.student_text_loss or self.loss,
        ) and self.student_text_loss not in (
            None,
            self.loss,
        ):
            yield ConfigError(
                "recipe.student_text_loss",
                self.student_text_loss,
                "be null where one of the losses is moment_gap",
                "both critics need their text",
            )
        for name in ("loss_weight", "anchor_weight", "lm_weight", "long_weight"):
            if getattr(self, name) < 0:
                yield ConfigError(f"recipe.{name}", getattr(self, name), "be >= 0", "0 turns the term off")
        if max(self.loss_weight, self.anchor_weight, self.lm_weight, self.long_weight) == 0:
            yield ConfigError("recipe.loss_weight", self.loss_weight, "be > 0 when no other term weighs anything",
                       "the student would learn nothing")  # fmt: skip
        for name in ("anchor_weight", "lm_weight"):
            if self.teacher_text == "none" and getattr(self, name) > 0:
                yield ConfigError(f"recipe.{name}", getattr(self, name), "be 0 when recipe.teacher_text=none",
                           "the term is on that text; set it to 0, or choose teacher_text=sampled")  # fmt: skip
        if self.long_weight > 0 and not self.uses_student_text:
            yield ConfigError(
                "recipe.long_weight",
                self.long_weight,
                "be 0 unless student text is used",
                "the long-horizon term is an expectation over the student's own text",
            )


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The two critics (action-value functions)."""

    form: Literal["learned", "closed_form", "sign"] = "learned"
    """What plays against the student: two learned critics, or what they would be without limits:
    ``closed_form``, the optimum of the regularised game, or ``sign``, B sign(teacher - student)."""
    features: Literal["ratio", "teacher", "both"] = "ratio"
    """What a critic sees: ``teacher``: the teacher's hidden state and unembedding;
    ``both``: and the student's; ``ratio``: the teacher's and the log-ratio of the policies."""
    rank: int | None = 64
    """Rank r of the bilinear form; null: dense, a head of its own row for every token (as large as
    the teacher's, with its optimiser's state)."""
    start: Literal["zero", "random"] = "zero"
    """Start of the bilinear form. random with ``learning_rate=0`` is a critic that never learns."""
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
    positions_per_step: int | None = None
    """Positions of a critic step, at most about; null: all, a K-th of the batch. A critic of low rank
    learns as well from some hundreds, and each costs both policies' logits."""
    learning_rate: float = 1e-3
    """Rate of Adam(0, 0.9); 0: the critics stay as they start."""
    ema: float = 0.0
    """Decay per critic step of a running mean of the critics, against which the student is
    optimised instead of the newest ones; 0: the newest."""
    max_grad_norm: float = 1.0
    """Clipping of the critics' gradient."""
    warmup_updates: int = 0
    """Updates at the start in which only the critics move, in steps of about 512 positions. They count
    in ``learner.num_updates``; the student's learning rate starts after them."""

    @property
    def penalty(self) -> float:
        return 2.0 / self.bound if self.variance_penalty is None else self.variance_penalty

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("critic", self, ">= 1", "rank", "num_steps", "positions_per_step")
        yield from bounded("critic", self, "> 0", "bound", "variance_penalty", "max_grad_norm")
        yield from bounded("critic", self, ">= 0", "learning_rate", "warmup_updates")
        yield from bounded("critic", self, "[0, 1)", "ema")


@dataclass(frozen=True, kw_only=True)
class CreditConfig:
    """What a token of the student is charged with for what follows it (``recipe.long_weight``)."""

    form: Literal["practical", "exact"] = "practical"
    """``practical``: every token weighs the same, over one count of tokens, and returns are means.
    ``exact``: the gradient of the discounted distance itself: weight gamma^t, sums over a response,
    divided by the number of responses, plain returns."""
    cost: Literal["moment_gap", "log_ratio"] = "moment_gap"
    """``moment_gap``: the critic's gap before a token; ``log_ratio``: log student - log teacher of
    the token itself."""
    span: Literal["future", "own", "all"] = "future"
    """Costs that a token answers for: of later tokens (its own is in the direct term), its own, or both."""
    cost_scale: float = 1.0
    """Costs are divided by this."""
    cost_max: float | None = None
    """Costs are clipped to this size; null: not."""
    normalize: Literal["discount", "length", "none"] = "discount"
    """Divisor of a return: the sum of its discounts (a mean), the number of tokens left, or 1.
    ``form=exact`` never divides."""
    baseline: Literal["leave_one_out", "whiten", "none"] = "leave_one_out"
    """Subtracted from returns: the mean of the group's other members at the same step; or all
    returns of the update are brought to mean 0 and variance 1; or nothing."""
    ratio: Literal["none", "token", "per_decision"] = "token"
    """Correction for text of an older policy, r = student / behaviour: none; of the token itself;
    or with the product of all before it, which is unbiased and varies most."""
    ratio_max: float | None = 2.0
    """Ratios are cut here; null: not (unbiased)."""
    ppo_clip: float | None = None
    """Clip of the ratio around 1 as in PPO, instead of ``ratio``; null: none."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("credit", self, "> 0", "cost_scale", "cost_max", "ratio_max", "ppo_clip")
        if self.form == "exact":
            for name in ("cost_max", "ppo_clip"):
                if getattr(self, name) is not None:
                    yield ConfigError(f"credit.{name}", getattr(self, name), "be null when credit.form=exact",
                               "a clipped cost has another gradient")  # fmt: skip
            if self.baseline == "whiten":
                yield ConfigError("credit.baseline", self.baseline, "not be whiten when credit.form=exact",
                           "choose leave_one_out, which adds no bias")  # fmt: skip
        if self.ppo_clip is not None and self.ratio == "per_decision":
            yield ConfigError(
                "credit.ppo_clip", self.ppo_clip, "be null when credit.ratio=per_decision",
                "choose one correction for stale text",
            )  # fmt: skip
