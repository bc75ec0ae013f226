"""An update against a reference without packs, chunks or shared work, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.config import CreditConfig, CriticConfig, LearnerConfig, MethodConfig, RecipeConfig
from distill.metrics import name_violations
from distill.objectives import closed_form_critic, moment_gap, policy_gradient
from learner import critic_step, vocabulary
from learner.credit_step import assign_credit
from learner.critic_step import critic_update
from learner.critics import CriticPair, ModelSize
from learner.losses import position_losses
from learner.positions import Heads, Policies, Positions, collect_positions
from learner.student_step import _gradient_squares, student_update
from learner.update import update
from learner.vocabulary import Head, LogitTransform
from learner.witness import witnesses
from tests.unit.maths.batches import (
    SIZES,
    VOCABULARY,
    Row,
    TinyStudent,
    batch_of,
    critic_pair,
    random_rows,
    teacher_head,
)
from tests.unit.maths.slow import slow_loss

LEARNER = LearnerConfig(max_grad_norm=1e9, vocabulary_chunk=7)
CRITIC = CriticConfig(rank=4, max_grad_norm=1e9)


def method(
    recipe: RecipeConfig | None = None, critic: CriticConfig = CRITIC, credit: CreditConfig | None = None
) -> MethodConfig:
    return MethodConfig(
        recipe=recipe or RecipeConfig(), critic=critic, credit=credit or CreditConfig(), learner=LEARNER
    )


METHODS = {
    "ammd": method(RecipeConfig(lm_weight=0.1, loss_weight=0.8)),
    "ammd_paper": method(RecipeConfig(beta=0.5, anchor_weight=0.1, long_weight=0.7)),
    "off_policy": method(RecipeConfig(student_text="none", beta=0.5)),
    "on_policy": method(RecipeConfig(off_policy_text="none", loss="reverse_kl")),
    "gkd": method(RecipeConfig(student_text="mixed", loss="generalized_jsd", jsd_beta=0.2, anchor_weight=0)),
    "kd": method(
        RecipeConfig(student_text="none", loss="forward_kl", loss_weight=0.5, anchor_weight=0, lm_weight=0.5)
    ),
    "sft": method(RecipeConfig(student_text="none", loss_weight=0, anchor_weight=0, lm_weight=1)),
    "sft_exact": method(
        RecipeConfig(student_text="none", loss_weight=0, anchor_weight=0, lm_weight=1, gamma=0.8),
        credit=CreditConfig(form="exact"),
    ),
    "anchor_only": method(RecipeConfig(loss_weight=0)),
    "jsd_and_critic": method(RecipeConfig(anchor="generalized_jsd", anchor_weight=1.0, loss_weight=0.3)),
    "two_skews": method(
        RecipeConfig(loss="skew_forward_kl", student_text_loss="skew_reverse_kl", skew=0.2, anchor_weight=0)
    ),
    "sign": method(RecipeConfig(long_weight=0.3), CriticConfig(form="sign", bound=1.5)),
    "closed_form": method(RecipeConfig(), CriticConfig(form="closed_form")),
    "dense": method(RecipeConfig(long_weight=0.3), replace(CRITIC, rank=None, features="both")),
    "ema": method(RecipeConfig(long_weight=0.3), replace(CRITIC, ema=0.9)),
    "blackbox": method(
        RecipeConfig(teacher="text", student_text="none", loss_weight=5, lm_weight=1, anchor_weight=0)
    ),
    "exact": method(
        RecipeConfig(beta=0.4, long_weight=0.7, lm_weight=0.1, gamma=0.8),
        credit=CreditConfig(form="exact", ratio="per_decision", ratio_max=None),
    ),
    "per_decision": method(
        RecipeConfig(beta=0.4, long_weight=0.7, gamma=0.8),
        credit=CreditConfig(ratio="per_decision", ratio_max=1.5, normalize="length", span="all"),
    ),
    "no_ratio": method(
        RecipeConfig(long_weight=0.7), credit=CreditConfig(ratio="none", baseline="none", normalize="none")
    ),
    "minillm": method(
        RecipeConfig(off_policy_text="none", loss="reverse_kl", long_weight=1.0, anchor_weight=0),
        credit=CreditConfig(
            cost="log_ratio",
            cost_scale=0.5,
            cost_max=2.0,
            span="all",
            normalize="length",
            baseline="whiten",
            ppo_clip=0.2,
        ),
    ),
    "opd": method(
        RecipeConfig(off_policy_text="none", loss_weight=0, anchor_weight=0, long_weight=1.0),
        credit=CreditConfig(cost="log_ratio", span="own", normalize="none", baseline="none"),
    ),
}
RECIPES = {name: METHODS[name].recipe for name in METHODS}


def rows_for(recipe: RecipeConfig) -> list[Row]:
    return [
        row
        for row in random_rows()
        if (row.on_policy and recipe.student_text != "none")
        or (not row.on_policy and recipe.off_policy_text != "none")
    ]


def run(
    method: MethodConfig,
    rows: Sequence[Row],
    packs: Sequence[Sequence[int]] | None = None,
    *,
    student: TinyStudent | None = None,
    teacher: Head | None = None,
) -> tuple[dict[str, float], dict[str, Tensor], CriticPair]:
    """Metrics, the student's gradients (a step of size 1), and the critics after one update."""
    student = student or TinyStudent()
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    critics = critic_pair(method.critic, shake=0.1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    learned = critics if method.critic.form == "learned" else None
    metrics = update(
        student, optimizer, batch_of(rows, packs), teacher or teacher_head(), learned, method, seed=1
    )
    grads = {name: before[name] - value.detach() for name, value in student.named_parameters()}
    return metrics, grads, critics


def assert_same(left, right) -> None:
    """Metrics, gradients and critics of two runs."""
    torch.testing.assert_close(left[0], right[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(left[1], right[1], atol=1e-10, rtol=1e-9)
    for a, b in zip(left[2].parameters(), right[2].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("zero_sum", [False, True])
def test_the_students_step_is_the_gradient_of_the_equations(name, zero_sum):
    settings = replace(METHODS[name], critic=replace(METHODS[name].critic, zero_sum=zero_sum))
    rows = rows_for(settings.recipe)
    metrics, grads, critics = run(settings, rows, [list(range(len(rows)))])
    student = TinyStudent()
    loss = slow_loss(settings, rows, student, teacher_head(), critics)
    loss.backward()
    assert metrics["policy/loss"] == pytest.approx(float(loss.detach()), abs=1e-7)
    for parameter_name, parameter in student.named_parameters():
        torch.testing.assert_close(grads[parameter_name], parameter.grad, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", ["ammd", "ammd_paper", "gkd", "sft", "exact", "minillm", "sign", "dense"])
def test_packing_micro_batches_and_chunks_do_not_matter(monkeypatch, name):
    settings, rows = METHODS[name], rows_for(RECIPES[name])
    n = len(rows)
    one_each = run(settings, rows)
    assert_same(one_each, run(settings, rows, [list(range(n))]))
    assert_same(one_each, run(settings, rows, [list(range(n // 2, n))[::-1], list(range(n // 2))]))
    monkeypatch.setattr(vocabulary, "_BLOCK_BYTES", 3 * 4 * VOCABULARY)
    for chunk in (1, 5, 1000):
        chunked = replace(settings, learner=replace(LEARNER, vocabulary_chunk=chunk))
        assert_same(one_each, run(chunked, rows, [list(range(n))]))


@pytest.mark.parametrize("name", ["ammd", "ammd_paper", "gkd"])
def test_kept_activations_spare_the_second_pass_and_change_nothing(name):
    class Counting(TinyStudent):
        passes = 0

        def states(self, pack):
            self.passes += 1
            return super().states(pack)

    settings, rows = METHODS[name], rows_for(RECIPES[name])
    students = [Counting(), Counting()]
    results = [
        run(replace(settings, learner=replace(LEARNER, keep_activations=keep)), rows, student=student)
        for student, keep in zip(students, (False, True), strict=True)
    ]
    assert_same(*results)
    critics_pass = len(rows) if settings.recipe.uses_critics else 0
    assert [student.passes for student in students] == [len(rows) + critics_pass, len(rows)]


@pytest.mark.parametrize("name", ["ammd", "ammd_paper", "gkd", "exact", "minillm"])
def test_the_order_of_rows_does_not_matter(name):
    settings, rows = METHODS[name], rows_for(RECIPES[name])
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))]
    assert_same(run(settings, rows, [list(range(len(rows)))]), run(settings, shuffled))


@pytest.mark.parametrize(("student_tail", "teacher_tail"), [(5, 0), (0, 4)])
def test_a_padded_vocabulary_does_not_matter(student_tail, teacher_tail):
    """The student's tail has no gradient; the teacher's is never seen."""
    settings, rows = METHODS["ammd_paper"], random_rows()

    def padded(weight: Tensor, count: int) -> Tensor:
        return torch.cat([weight, torch.full((count, weight.shape[1]), 3.0, dtype=weight.dtype)])

    student = TinyStudent()
    student.head_weight = torch.nn.Parameter(padded(student.head_weight.detach(), student_tail))
    teacher = teacher_head()
    teacher = Head(padded(teacher.weight, teacher_tail), teacher.transform)
    plain = run(settings, rows)
    metrics, grads, critics = run(settings, rows, student=student, teacher=teacher)
    assert not grads["head_weight"][VOCABULARY:].any()
    grads["head_weight"] = grads["head_weight"][:VOCABULARY]
    assert_same(plain, (metrics, grads, critics))


@pytest.mark.parametrize("features", ["ratio", "teacher", "both"])
def test_critics_learn_the_difference(features):
    """On a fixed student the gap rises to the best bounded critic's; in sample."""
    student, rows = TinyStudent(), random_rows()
    # A rate of 5e-2 is chaotic here: the last digits of a matrix product decide where it is after 25 steps.
    config = CriticConfig(features=features, learning_rate=1e-2, rank=16)
    critics, heads = critic_pair(config), Heads.of(student, teacher_head())
    positions, _ = collect_positions(student, batch_of(rows))
    seen = [critic_update(positions, heads, critics, config, chunk=1000, seed=n) for n in range(40)]
    for source in ("off", "on"):
        tightness = [metrics[f"critic/tightness_{source}"] for metrics in seen]
        if features == "ratio":  # it starts at the optimum: nothing to gain, and it stays
            assert tightness[0] == pytest.approx(1.0)
        else:
            assert tightness[0] == 0.0
        assert tightness[-1] > (0.9 if features == "ratio" else 0.6)
        if features == "ratio":
            assert tightness[-1] == pytest.approx(1.0, abs=0.05)
            assert float(critics[source].ratio_weight.detach()) == pytest.approx(0.5, abs=0.05)


def test_critics_learn_from_tokens_alone():
    """No probabilities of the teacher: the gap between the text and the policy rises, in sample, and
    the proxy's states are all the critic sees."""
    student, rows = TinyStudent(), random_rows()
    config = CriticConfig(features="teacher", learning_rate=1e-2, rank=16)
    critics, heads = critic_pair(config), Heads.of(student, teacher_head())
    positions, _ = collect_positions(student, batch_of(rows))
    seen = [
        critic_update(positions, heads, critics, config, chunk=1000, seed=n, from_text=True)
        for n in range(40)
    ]
    gaps = [metrics["critic/d_mm_off"] for metrics in seen]
    assert gaps[0] == 0.0
    assert gaps[-1] > 0.3
    assert not any("tightness" in name for metrics in seen for name in metrics)


def test_a_teacher_of_text_alone_teaches_the_critics_by_its_tokens():
    """The proxy's probabilities are not what the critics learn from."""
    settings, rows = METHODS["blackbox"], rows_for(RECIPES["blackbox"])
    metrics, _, critics = run(settings, rows)
    by_tokens = critic_pair(settings.critic, shake=0.1)
    student = TinyStudent()
    positions, _ = collect_positions(student, batch_of(rows))
    heads = Heads.of(student, teacher_head())
    critic_update(positions, heads, by_tokens, settings.critic, chunk=7, seed=1, from_text=True)
    for ours, theirs in zip(critics.parameters(), by_tokens.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert not any("tightness" in name for name in metrics)


CRITICS = {
    "ratio": replace(CRITIC, bound=1.5, variance_penalty=1.3),
    "both": replace(CRITIC, features="both", bound=1.5, variance_penalty=1.3),
    "dense": replace(CRITIC, features="teacher", rank=None, variance_penalty=0.7),
    "from_text": replace(CRITIC, features="teacher", variance_penalty=1.3),
    "ratio_from_text": replace(CRITIC, variance_penalty=1.3),
}


@pytest.mark.parametrize("discount", [1.0, 0.5])
@pytest.mark.parametrize("name", CRITICS)
def test_the_critics_gradient_is_that_of_their_loss_written_out(monkeypatch, name, discount):
    """-(g_f - λ/2 Var_m f), or from tokens -(f(y) - E_p f) + λ/4 (E_p f² + f(y)²), a mean over positions in
    which each weighs γ^t with ``credit.form=exact``: what the critics maximise is the distance that the
    student minimises."""
    config, from_text = replace(CRITICS[name], num_steps=1), name.endswith("from_text")
    student = TinyStudent()
    positions, _ = collect_positions(student, batch_of(random_rows()))
    heads = Heads.of(student, teacher_head())
    trained, reference = (critic_pair(config, shake=0.1) for _ in range(2))
    monkeypatch.setattr(trained, "step", lambda: torch.zeros(()))
    metrics = critic_update(
        positions, heads, trained, config, chunk=7, seed=0, discount=discount, from_text=from_text
    )
    for source in ("off", "on"):
        part, critic = positions.of(source), reference[source]
        log_p = heads.student.logits(part.student_hidden).log_softmax(-1)
        log_q = heads.teacher.logits(part.teacher_hidden).log_softmax(-1)
        p, q = log_p.exp().detach(), log_q.exp()
        coefficients = critic.coefficients(part.teacher_hidden, part.student_hidden)
        value = coefficients @ critic.table(heads.teacher, heads.student).T
        if critic.ratio_weight is not None:
            value = value + critic.ratio_weight * (log_q - log_p).detach()
        f = config.bound * torch.tanh(value)
        if from_text:
            at_token = f[torch.arange(len(part)), part.targets]
            gap = at_token - (p * f).sum(-1)
            penalty = config.penalty / 4 * ((p * f**2).sum(-1) + at_token**2)
        else:
            m = (p + q) / 2
            gap = ((q - p) * f).sum(-1)
            penalty = config.penalty / 2 * ((m * f**2).sum(-1) - (m * f).sum(-1) ** 2)
        weight = discount ** part.step.double()
        loss = (weight * (penalty - gap)).sum() / weight.sum()
        loss.backward()
        assert metrics[f"critic/loss_{source}"] == pytest.approx(float(loss.detach()), abs=1e-12)
        d_mm = (weight * gap).sum() / weight.sum()
        assert metrics[f"critic/d_mm_{source}"] == pytest.approx(float(d_mm.detach()), abs=1e-12)
        for (which, ours), theirs in zip(
            trained[source].named_parameters(), critic.parameters(), strict=True
        ):
            assert ours.grad is not None and ours.grad.abs().max() > 0, which
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-9)


def test_exact_critics_weigh_positions_as_the_student_does():
    rows = random_rows()
    seen = run(METHODS["exact"], rows)[0]["critic/d_mm_on"]
    plain = replace(METHODS["exact"], credit=replace(METHODS["exact"].credit, form="practical"))
    assert seen != pytest.approx(run(plain, rows)[0]["critic/d_mm_on"])


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("dense", "blackbox", "sft", "sft_exact")]
)
def test_a_student_that_is_the_teacher_rests(name):
    """Loss and gradient through a whole update, with the long horizon, MiniLLM's and OPD's advantages: no
    term but cross-entropy pulls, and a critic of the log-ratio at its start sees nothing."""
    settings = METHODS[name]
    settings = replace(settings, recipe=replace(settings.recipe, lm_weight=0.0))
    student = TinyStudent()
    rows = [
        replace(row, hidden=_states(student, row), behavior=_own_logprobs(student, row))
        for row in rows_for(settings.recipe)
    ]
    critics = critic_pair(settings.critic, sizes=(SIZES[1], SIZES[1]))
    teacher = Head(student.head_weight.detach().clone(), LogitTransform())
    learned = critics if settings.critic.form == "learned" else None
    before = [parameter.detach().clone() for parameter in student.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    metrics = update(student, optimizer, batch_of(rows), teacher, learned, settings, seed=1)
    assert metrics["policy/loss"] == pytest.approx(0.0, abs=1e-12)
    for ours, was in zip(student.parameters(), before, strict=True):
        torch.testing.assert_close(ours.detach(), was, atol=1e-12, rtol=0)


def _states(student: TinyStudent, row: Row) -> Tensor:
    tokens = torch.tensor(row.prompt + row.response[:-1])
    states = torch.tanh(student.embedding[tokens] + student.position[: len(tokens)])
    return states[len(row.prompt) - 1 :].detach()


def _own_logprobs(student: TinyStudent, row: Row) -> Tensor:
    logprobs = (_states(student, row) @ student.head_weight.detach().T).log_softmax(-1)
    return logprobs[torch.arange(len(row.response)), torch.tensor(row.response)]


def test_the_students_gradient_is_clipped_as_one():
    settings = METHODS["ammd"]
    rows = rows_for(settings.recipe)
    whole_metrics, whole, _ = run(settings, rows)
    clipped = replace(settings, learner=replace(settings.learner, max_grad_norm=1e-3))
    metrics, grads, _ = run(clipped, rows)
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in whole.values()]))
    assert metrics["policy/grad_norm"] == pytest.approx(float(norm))
    assert whole_metrics["policy/grad_norm"] == pytest.approx(float(norm))
    for name, grad in grads.items():
        torch.testing.assert_close(grad, whole[name] * 1e-3 / norm, atol=1e-9, rtol=1e-4)


def test_slices_are_never_empty():
    """More slices than the longest row has tokens would leave whole updates without a critic step."""
    student, rows = TinyStudent(), random_rows()
    positions, _ = collect_positions(student, batch_of(rows))
    heads, config = Heads.of(student, teacher_head()), replace(CRITIC, positions_per_step=1)
    for seed in range(20):
        critics = critic_pair(config)
        critic_update(positions, heads, critics, config, chunk=7, seed=seed)
        assert any(parameter.grad is not None for parameter in critics.parameters()), seed


def test_critic_metrics_are_fresh_and_of_the_closed_form():
    """At the start of a ratio-aware critic the gap is Σ (q−p)²/(q+p) on the first slice."""
    student, rows = TinyStudent(), random_rows()
    config = CriticConfig(num_steps=2)
    positions, _ = collect_positions(student, batch_of(rows))
    heads = Heads.of(student, teacher_head())
    metrics = critic_update(positions, heads, critic_pair(config), config, chunk=100, seed=0)
    for source in ("off", "on"):
        part = positions.of(source)
        part = part.select(part.step % 2 == 0)
        log_p, log_q = (
            head.logits(hidden).log_softmax(-1)
            for head, hidden in ((heads.student, part.student_hidden), (heads.teacher, part.teacher_hidden))
        )
        p, q = log_p.exp(), log_q.exp()
        best = closed_form_critic(log_p, log_q, 1.0, 2.0)
        gap = ((q - p) ** 2 / (q + p)).sum(-1).mean()
        assert metrics[f"critic/d_mm_{source}"] == pytest.approx(float(gap))
        assert metrics[f"critic/tightness_{source}"] == pytest.approx(1.0)
        saturated = ((p + q) / 2 * (best.abs() > 0.95)).sum(-1).mean()
        assert metrics[f"critic/saturation_{source}"] == pytest.approx(float(saturated))


@pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0, 10.0])
def test_the_closed_form_is_tight_at_any_distance(distance):
    """The start of a ratio-aware critic, and nothing but it: one that starts at zero finds nothing."""
    generator = torch.Generator().manual_seed(5)
    log_p = torch.randn(50, VOCABULARY, generator=generator, dtype=torch.float64)
    log_q = log_p + distance * torch.randn(50, VOCABULARY, generator=generator, dtype=torch.float64)
    # States that are the logits themselves: identity heads.
    identity = Head(torch.eye(VOCABULARY, dtype=torch.float64), LogitTransform())
    heads, size = Heads(identity, identity), ModelSize(VOCABULARY, VOCABULARY)
    zeros = torch.zeros(50, dtype=torch.int64)
    positions = Positions(
        student_hidden=log_p, teacher_hidden=log_q, on_policy=torch.arange(50) % 2 == 0, row=torch.arange(50),
        step=zeros, targets=zeros, behavior_logprobs=zeros.double(),
    )  # fmt: skip
    for features, expected in (("ratio", 1.0), ("teacher", 0.0)):
        config = CriticConfig(features=features, rank=8, num_steps=1)
        critics = critic_pair(config, sizes=(size, size))
        metrics = critic_update(positions, heads, critics, config, chunk=100, seed=0)
        for source in ("off", "on"):
            assert metrics[f"critic/tightness_{source}"] == pytest.approx(expected, abs=1e-4)


def test_policy_metrics():
    rows = random_rows()
    student, teacher = TinyStudent(), teacher_head()
    metrics, _, _ = run(METHODS["ammd"], rows, student=student)
    student = TinyStudent()
    tv: dict[str, list[float]] = {"off": [], "on": [], "first": [], "last": []}
    forward: dict[bool, list[float]] = {False: [], True: []}
    reverse: dict[bool, list[float]] = {False: [], True: []}
    behavior: list[float] = []
    entropies: list[float] = []
    for row in rows:
        tokens = torch.tensor(row.prompt + row.response[:-1])
        hidden = torch.tanh(student.embedding[tokens] + student.position[: len(tokens)])[
            len(row.prompt) - 1 :
        ]
        log_p = (hidden @ student.head_weight.T).log_softmax(-1).detach()
        q = teacher.logits(row.hidden).softmax(-1)
        distance = ((log_p.exp() - q).abs().sum(-1) / 2).tolist()
        third = len(distance) // 3
        if row.on_policy:
            tv["first"] += distance[:third]
            tv["last"] += distance[len(distance) - third :]
            behavior += [float(row.behavior[t] - log_p[t, y]) for t, y in enumerate(row.response)]
            entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
        tv["on" if row.on_policy else "off"] += [d for d, c in zip(distance, row.counted, strict=True) if c]
        p, log_q = log_p.exp(), q.log()
        for found, values in ((forward, q * (log_q - log_p)), (reverse, p * (log_p - log_q))):
            found[row.on_policy] += values.sum(-1)[torch.tensor(row.counted)].tolist()
    expected = {
        "policy/tv_off": tv["off"], "policy/tv_on": tv["on"], "policy/tv_on_first_third": tv["first"],
        "policy/tv_on_last_third": tv["last"], "policy/behavior_gap": behavior, "policy/entropy_on": entropies,
        "policy/forward_kl_off": forward[False], "policy/forward_kl_on": forward[True],
        "policy/reverse_kl_off": reverse[False], "policy/reverse_kl_on": reverse[True],
    }  # fmt: skip
    for name, values in expected.items():
        assert metrics[name] == pytest.approx(sum(values) / len(values), abs=1e-7), name
    ratios = [math.exp(-gap) for gap in behavior]
    assert metrics["policy/importance_ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-6)
    ess = sum(ratios) ** 2 / sum(ratio**2 for ratio in ratios) / len(ratios)
    assert 0 < ess < 1
    assert metrics["policy/importance_ess"] == pytest.approx(ess, rel=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())
    assert not list(name_violations(metrics))


def test_the_ratio_of_the_long_to_the_direct_gradient_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    z, q, f = (torch.randn(5, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(3))
    targets, advantage = torch.arange(5), torch.randn(5, generator=generator, dtype=torch.float64)
    both = Policies.from_logits(z, q)
    squares = _gradient_squares(both, f, targets, advantage)
    z.requires_grad_()
    logprobs = z.log_softmax(-1)
    losses = {
        "direct": moment_gap(logprobs, both.teacher_logprobs, f),
        "long": policy_gradient(logprobs, targets, advantage),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
        torch.testing.assert_close(squares[f"{name}_gradient_square"], gradient.square().sum(-1))


def test_the_logged_ratio_of_the_gradients_weighs_both_as_the_loss_does():
    """Against autograd position by position; twice the weight of the direct term is half the ratio."""
    fixed = replace(CRITIC, learning_rate=0.0)  # critics that do not learn are the same under both losses

    def ratio(loss_weight: float) -> float:
        settings = method(RecipeConfig(long_weight=0.7, loss_weight=loss_weight), fixed)
        return run(settings, random_rows())[0]["policy/long_over_direct"]

    assert ratio(2.0) == pytest.approx(ratio(1.0) / 2)
    student = TinyStudent()
    settings = method(RecipeConfig(long_weight=0.7), fixed)
    critics, heads = critic_pair(fixed, shake=0.1), Heads.of(student, teacher_head())
    batch = batch_of(random_rows())
    on = collect_positions(student, batch)[0].of("on")
    witness = witnesses(fixed, critics, heads)["on"]
    credit = assign_credit(on, batch.group, heads, witness, settings.recipe, settings.credit, chunk=5)
    direct = long = 0.0
    for n in range(len(on)):
        part = on.select(torch.arange(len(on)) == n)
        logits = heads.student.logits(part.student_hidden).detach().requires_grad_()
        both = Policies.from_logits(logits, heads.teacher.logits(part.teacher_hidden))
        f = witness.at(part.teacher_hidden, part.student_hidden, 5)(slice(0, 1), both, both.log_ratio())
        advantage = credit.advantage[part.row, part.step]
        losses = (
            moment_gap(*both.pair, f),
            0.7 * policy_gradient(both.policy_logprobs, part.targets, advantage),
        )
        grads = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in losses]
        direct, long = direct + float(grads[0].square().sum()), long + float(grads[1].square().sum())
    assert ratio(1.0) == pytest.approx(math.sqrt(long / direct), rel=1e-6)


def test_a_warm_up_update_makes_short_steps(monkeypatch):
    student, critics = TinyStudent(), critic_pair(CRITIC)
    positions, _ = collect_positions(student, batch_of(random_rows()))
    heads = Heads.of(student, teacher_head())
    steps = []
    monkeypatch.setattr(critic_step, "WARM_UP_POSITIONS", 5)
    monkeypatch.setattr(critics, "step", lambda: steps.append(1) or torch.zeros(()))
    critic_update(positions, heads, critics, CRITIC, chunk=7, seed=0)
    assert len(steps) == CRITIC.num_steps
    critic_update(positions, heads, critics, CRITIC, chunk=7, seed=0, warm_up=True)
    longest = int(positions.step.max()) + 1  # a slice is a place in the row
    assert len(steps) == CRITIC.num_steps + min(math.ceil(len(positions) / 5), longest) > 2 * CRITIC.num_steps


def test_smaller_slices(monkeypatch):
    """As many steps on fewer positions: every M-th token of every row."""
    student, critics = TinyStudent(), critic_pair(CRITIC)
    positions, _ = collect_positions(student, batch_of(random_rows()))
    heads = Heads.of(student, teacher_head())
    seen = []
    gradient = critic_step._critic_gradient

    def recording(part, *rest):
        seen.append(part)
        return gradient(part, *rest)

    monkeypatch.setattr(critic_step, "_critic_gradient", recording)
    config = replace(CRITIC, positions_per_step=12)
    critic_update(positions, heads, critics, config, chunk=7, seed=2)
    num_slices = math.ceil(len(positions) / 12)
    assert num_slices > CRITIC.num_steps
    for source in ("off", "on"):
        parts = [part for part in seen if bool(part.on_policy[0]) == (source == "on")]
        assert len(parts) == CRITIC.num_steps
        assert {int(s) for part in parts for s in (part.step + 2) % num_slices} == set(
            range(CRITIC.num_steps)
        )


def test_a_warm_up_update_moves_the_critics_alone():
    student, critics = TinyStudent(), critic_pair(CRITIC)
    before = [value.detach().clone() for value in student.parameters()]
    start = [value.detach().clone() for value in critics.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    metrics = update(
        student, optimizer, batch_of(random_rows()), teacher_head(), critics, METHODS["ammd"], seed=0,
        critics_only=True,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start, critics.parameters(), strict=True))
    assert all(name.startswith("critic/") for name in metrics)


def test_a_text_recipe_needs_neither_teacher_nor_payload():
    rows = rows_for(RECIPES["sft"])
    batch = batch_of(rows)
    bare = replace(batch, packs=tuple(replace(pack, teacher_hidden=None) for pack in batch.packs))
    student = TinyStudent()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    metrics = update(student, optimizer, bare, None, None, METHODS["sft"], seed=0)
    assert metrics["policy/loss"] == pytest.approx(run(METHODS["sft"], rows)[0]["policy/loss"])
    with pytest.raises(ValueError, match="teacher states"):
        student_update(student, optimizer, bare, Heads.of(student, teacher_head()), None, METHODS["kd"])
    with pytest.raises(ValueError, match="needs the teacher's head"):
        update(student, optimizer, bare, None, None, METHODS["kd"], seed=0)


def test_what_is_not_finite_stops_before_the_step():
    student = TinyStudent()
    with torch.no_grad():
        student.embedding[:] = torch.nan
    before = student.head_weight.detach().clone()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match="the student's loss is nan"):
        heads = Heads.of(student, teacher_head())
        student_update(student, optimizer, batch_of(random_rows()), heads, None, METHODS["anchor_only"])
    assert torch.equal(before, student.head_weight)


def test_costs_before_the_students_step_are_the_gaps_it_minimises():
    student, rows = TinyStudent(), random_rows()
    settings = method(credit=CreditConfig(span="own", normalize="none", baseline="none", ratio="none"))
    critics, heads = critic_pair(CRITIC, shake=0.2), Heads.of(student, teacher_head())
    batch = batch_of(rows)
    positions, _ = collect_positions(student, batch)
    opponents = witnesses(CRITIC, critics, heads)
    on = positions.of("on")
    credit = assign_credit(on, batch.group, heads, opponents["on"], settings.recipe, settings.credit, chunk=5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    metrics = student_update(student, optimizer, batch, heads, opponents, settings)
    gaps = credit.advantage[on.row, on.step]
    assert metrics["policy/moment_gap_on"] == pytest.approx(float(gaps.mean()))


def test_what_the_loss_mask_leaves_out_is_seen_by_nobody():
    rows = random_rows()
    partly = next(row for row in rows if not all(row.counted))
    hidden = partly.hidden.clone()
    hidden[~torch.tensor(partly.counted)] += 5
    changed = [replace(row, hidden=hidden) if row is partly else row for row in rows]
    assert_same(run(METHODS["ammd"], rows), run(METHODS["ammd"], changed))


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_no_gradient_of_the_students_reaches_a_critic_or_the_teacher(penalty):
    logits, teacher, f = (value.requires_grad_() for value in torch.randn(3, 4, VOCABULARY).double())
    both = Policies.from_logits(logits, teacher)
    targets = torch.zeros(4, dtype=torch.int64)
    loss = position_losses(RECIPES["ammd"], "off", both, targets, f=f, variance_penalty=penalty).sum()
    grads = torch.autograd.grad(loss, [logits, teacher, f], allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None
