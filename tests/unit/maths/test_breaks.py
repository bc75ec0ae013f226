"""Named breaks of the method's code, each of which some test must catch.

A break replaces a piece of a function's source; then one test of this folder runs, and it must fail. The
list therefore measures the tests. A change to a function keeps the pieces that its breaks name, or
updates the breaks.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distill import credit, objectives
from learner.update import credit_step as learner_credit
from learner.update import critic_step, critics, losses, student_step, witness
from learner.update import update as update_module
from tests.unit.maths import test_credit as on_credit
from tests.unit.maths import test_critic_step as on_critic_step
from tests.unit.maths import test_critics as on_critics
from tests.unit.maths import test_objectives as on_objectives
from tests.unit.maths import test_older_text as on_older_text
from tests.unit.maths import test_tree as on_trees
from tests.unit.maths import test_update as on_update


def step(name: str, *, zero_sum: bool = False) -> Callable[[], None]:
    """The student's step of a method against the slow reference."""
    return partial(
        on_update.test_the_students_step_is_the_gradient_of_the_equations, name=name, zero_sum=zero_sum
    )


def tree(name: str) -> Callable[[], None]:
    """A recipe's gradient against finite differences."""
    return partial(on_trees.test_the_gradient_of_every_recipe, name=name)


def game(name: str) -> Callable[[], None]:
    return partial(on_trees.test_the_gradient_of_a_game_with_the_long_horizon, name=name)


class Patches:
    """Stands in for pytest's monkeypatch; nothing is undone, because every test makes new objects."""

    setattr = staticmethod(setattr)


def critic(name: str) -> Callable[[], None]:
    """A critic's gradient against its loss written out, with γ^t."""
    return partial(
        on_critic_step.test_the_critics_gradient_is_that_of_their_loss_written_out,
        Patches,
        name=name,
        discount=0.5,
    )


@dataclass(frozen=True)
class Break:
    name: str
    function: Any
    old: str
    new: str
    caught_by: Callable[[], None]


BREAKS = [
    Break("a sign: the student follows the teacher's enemy", objectives._difference,
          "return _probs(", "return -_probs(",
          partial(on_objectives.test_values_are_the_definitions, "moment_gap", False)),
    Break("a sign: costs taken as rewards", objectives.policy_gradient, "-cross_entropy(", "cross_entropy(",
          tree("opd")),
    Break("a sign: the log-ratio upside down", learner_credit.assign_credit,
          "here.policy_logprob - here.teacher_logprob", "here.teacher_logprob - here.policy_logprob", step("opd")),
    Break("a mask: positions that the loss leaves out", student_step._sorted_by_text,
          "pack.counted & ~pack.is_student_text", "~pack.is_student_text", step("ammd")),
    Break("a mask: what lies behind a row's end", credit.future_returns, "costs = costs * mask", "costs = costs",
          on_credit.test_returns_are_strictly_future),
    Break("a mask: whitening over positions that are not there", credit.whiten, "count = total(mask.sum()).clamp_min(1)",
          "count = torch.tensor(mask.numel())",
          on_credit.test_whitening_uses_only_real_tokens),
    Break("a detach: the advantage has a gradient", objectives.policy_gradient, "advantages.detach()", "advantages",
          on_objectives.test_cross_entropy_and_policy_gradient),
    Break("a detach: the student moves the critic", losses._main_loss, "f.detach(), **both", "f, **both",
          partial(on_update.test_no_gradient_of_the_students_reaches_a_critic_or_the_teacher, 0.0)),
    Break("a discount: none in returns", credit.future_returns, "gamma * (costs", "(costs", game("ammd")),
    Break("a discount: none on positions", student_step._StudentObjective._weights,
          "self._recipe.gamma ** step.to(wide)", "weight", step("exact")),
    Break("one token off: the present counted as future", credit.future_returns, "costs[:, t + 1] + ",
          "costs[:, t] + ", on_credit.test_returns_are_strictly_future),
    Break("one token off: a token's own ratio in its prefix", credit.products_before, "ratios[:, :-1]], dim=1)",
          "ratios[:, :-1]], dim=1) * ratios", step("per_decision")),
    Break("one token off: a later token's own cost without its own ratio", credit._reweighted, "later.cumprod(dim=1)",
          "products_before(later)", on_older_text.test_a_later_tokens_own_cost_needs_its_own_ratio),
    Break("a mask: ratios end where the loss leaves a token out", learner_credit.assign_credit, "fill=1.0", "fill=0.0",
          on_older_text.test_a_token_that_the_loss_leaves_out_has_ratio_one),
    Break("leave-one-out: the member itself in its baseline", credit.leave_one_out, "(total - own) / num_others.clamp_min(1)",
          "total / (num_others + 1).clamp_min(1)", on_credit.test_advantages_leave_the_row_itself_out),
    Break("leave-one-out: all rows one group", credit.leave_one_out, "_, index = group.unique(return_inverse=True)",
          "index = torch.zeros_like(group)", on_credit.test_advantages_leave_the_row_itself_out),
    Break("a denominator: a micro-batch's own", student_step._StudentObjective._policies_loss,
          "/ self._denominator[text]", "/ len(losses)",
          partial(on_update.test_the_students_step_is_the_gradient_of_the_equations, name="ammd", zero_sum=False)),
    Break("the other text's critic", student_step._StudentObjective._policies_loss, "values[text](", 'values["teacher_text"](',
          step("ammd")),
    Break("the anchor always forward KL", losses.position_losses, "DIVERGENCES[recipe.anchor]",
          'DIVERGENCES["forward_kl"]', step("jsd_and_critic")),
    Break("the anchor on the student's text", losses.position_losses, 'text == "teacher_text" and recipe.anchor_weight',
          "recipe.anchor_weight", step("ammd")),
    Break("beta on the wrong text", losses.text_weights, '"teacher_text": 1 - recipe.beta, "student_text": recipe.beta',
          '"teacher_text": recipe.beta, "student_text": 1 - recipe.beta', tree("ammd")),
    Break("the penalty seen by a student that should not", student_step._StudentObjective.__init__,
          "if method.critic.zero_sum else 0.0", "", step("ammd")),
    Break("half of the penalty", objectives.critic_loss, "0.5 * variance_penalty", "0.25 * variance_penalty",
          partial(on_trees.test_critic_ascent_reaches_the_closed_form, 2.0)),
    Break("a skew on the wrong side", objectives.skew_forward_kl,
          "_log_mixture(policy_logprobs, teacher_logprobs, policy_probs, teacher_probs, skew)",
          "_log_mixture(teacher_logprobs, policy_logprobs, teacher_probs, policy_probs, skew)", tree("distillm")),
    Break("clipping that helps: minimum for maximum", objectives.clipped_policy_gradient, "torch.maximum", "torch.minimum",
          step("minillm")),
    Break("ratios that are not cut", learner_credit.assign_credit, "ratio.clamp_max(config.ratio_max)", "ratio",
          step("per_decision")),
    Break("the sign critic takes sides on rounding", objectives.sign_critic, ".mul_(apart)", "",
          on_objectives.test_the_sign_critic_ignores_bfloat16_rounding),
    Break("an oracle with the wrong bound", witness._sign, "config.bound", "1.0", step("sign")),
    Break("the proxy's probabilities instead of the teacher's tokens", update_module._critics,
          'from_text=recipe.teacher_gives == "text"', "from_text=False",
          on_critic_step.test_a_text_only_teacher_trains_the_critics_through_its_tokens),
    Break("the newest critic instead of the running mean", witness.witnesses, "critics.witness(text)",
          "critics[text]", step("ema")),
    Break("critics on a distance that is not the student's", update_module._critics, "recipe.gamma if", "1.0 if",
          on_critic_step.test_exact_critics_weigh_positions_as_the_student_does),
    Break("a critic without its penalty", critic_step._critic_losses, "f, variance_penalty, **both.probs)",
          "f, 0.0, **both.probs)", critic("both")),
    Break("a ratio-aware critic with another penalty", critic_step._critic_losses, "optimum(log_ratio, variance_penalty)",
          "optimum(log_ratio, 2.0)", critic("ratio")),
    Break("a ratio-aware critic that follows rounding", critic_step._critic_losses, "if critic.ratio_weight", "if True or critic.ratio_weight",
          partial(on_critic_step.test_a_ratio_aware_critic_stays_at_the_optimum, 1.0)),
    Break("a critic of tokens without its penalty", critic_step._critic_gradient, "tokens, f, config.penalty",
          "tokens, f, 0.0", critic("from_text")),
    Break("a critic's mean over positions that all weigh the same", critic_step._critic_gradient, "weight @ losses",
          "losses.sum() / len(share)", critic("dense")),
    Break("the log-ratio's weight is never learned", critics.Critic.extra_parameters, "[self.ratio_weight]", "[]",
          critic("ratio")),
    Break("both critics clipped as one", critics.CriticPair.step,
          "nn.utils.clip_grad_norm_(critic.parameters(), self._max_grad_norm)",
          "nn.utils.clip_grad_norm_(self.parameters(), self._max_grad_norm)",
          on_critics.test_steps_clip_each_critic_and_refuse_what_is_not_finite),
    Break("future costs without the zero-sum game's penalty", learner_credit._at_tokens, "f, variance_penalty,", "f, 0.0,",
          step("dense", zero_sum=True)),
    Break("a student's gradient that is not clipped", student_step.student_step, "method.learner.max_grad_norm", "1e9",
          on_update.test_the_students_gradient_is_clipped_as_one),
    Break("cross-entropy without the discount", student_step._StudentObjective._text_loss, "weight[where] * losses",
          "losses", step("sft_exact")),
    Break("tightness against itself", critic_step._tightness, "gap / best if best > 0 else 1.0", "1.0",
          partial(on_critic_step.test_critics_learn_the_difference, "teacher")),
    Break("a running mean that runs backwards", critics.CriticPair._update_means, "1 - self._ema", "self._ema",
          on_critics.test_the_running_mean_of_the_critics),
]  # fmt: skip


@contextmanager
def broken(each: Break) -> Iterator[None]:
    function = inspect.unwrap(each.function)
    source = textwrap.dedent(inspect.getsource(function))
    assert each.old in source, f"{each.function.__qualname__} no longer holds {each.old!r}"
    # Decorators are dropped: only the code object is replaced.
    body = source[source.index("def ") :].replace(each.old, each.new, 1)
    namespace = dict(vars(inspect.getmodule(function)))
    exec(compile(body, f"<{each.name}>", "exec", annotations.compiler_flag), namespace)
    true_code = function.__code__
    function.__code__ = namespace[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = true_code


@pytest.mark.parametrize("each", BREAKS, ids=lambda each: each.name)
def test_a_break_is_caught(each: Break):
    with broken(each), pytest.raises((AssertionError, pytest.fail.Exception)):
        each.caught_by()


def test_a_break_is_undone():
    for each in BREAKS[:3]:
        with broken(each):
            pass
        each.caught_by()


def test_the_docs_count_them():
    method = Path(__file__).parents[3] / "docs" / "method.md"
    assert f"Named breaks: {len(BREAKS)} changes" in method.read_text()
