"""The critics' steps: what they learn, what of the text each step sees, what is measured of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from distill.config import CriticConfig
from distill.objectives import closed_form_critic
from learner.model.head import Head, LogitTransform
from learner.update import critic_step as critic_step_module
from learner.update.critic_step import critic_step
from learner.update.critics import CriticPair, ModelSize
from learner.update.positions import Heads, Positions, collect_positions
from learner.update.update import update
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
from tests.unit.maths.methods import CRITIC, LEARNER, METHODS, RECIPES, rows_for, run


@pytest.mark.parametrize("features", ["ratio", "teacher", "both"])
def test_critics_learn_the_difference(features):
    """On a fixed student the gap rises to the best bounded critic's; in sample."""
    student, rows = TinyStudent(), random_rows()
    # A rate of 5e-2 is chaotic here: the last digits of a matrix product decide where it is after 25 steps.
    config = CriticConfig(features=features, learning_rate=1e-2, rank=16)
    critics, heads = critic_pair(config), Heads.of(student, teacher_head())
    positions, _ = collect_positions(student, batch_of(rows))
    seen = [critic_step(positions, heads, critics, config, chunk=1000, update_number=n) for n in range(40)]
    for text in ("teacher_text", "student_text"):
        tightness = [metrics[f"critic/{text}.tightness"] for metrics in seen]
        if features == "ratio":  # it starts at the optimum: nothing to gain, and it stays
            assert tightness[0] == pytest.approx(1.0)
        else:
            assert tightness[0] == 0.0
        assert tightness[-1] > (0.9 if features == "ratio" else 0.6)
        if features == "ratio":
            assert tightness[-1] == pytest.approx(1.0, abs=0.05)
            assert float(critics[text].ratio_weight.detach()) == pytest.approx(0.5, abs=0.05)


def in_float32(rows: list[Row], pair: CriticPair, chunk: int) -> tuple[dict[str, float], TinyStudent]:
    """An update of ammd by a step of size 1, in the numbers that training uses."""
    student = TinyStudent().float()
    teacher = teacher_head()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    settings = replace(METHODS["ammd"], learner=replace(LEARNER, vocabulary_chunk=chunk))
    metrics = update(
        student,
        optimizer,
        batch_of(rows),
        Head(teacher.weight.float(), teacher.transform),
        pair,
        settings,
        update_number=0,
    )
    return metrics, student


def test_the_first_update_does_not_depend_on_the_chunk():
    """Critics at their start and a fresh Adam: a gradient of rounding errors would become steps of 3e-3."""
    found = []
    for chunk in (1, 2, 5, 1000):
        pair = CriticPair(CRITIC, *SIZES, seed=3)
        found.append((*in_float32(random_rows(), pair, chunk), pair))
    first_metrics, first_student, first_pair = found[0]
    for metrics, student, pair in found[1:]:
        assert metrics == pytest.approx(first_metrics, rel=1e-5, abs=1e-6)
        for ours, theirs in zip(pair.parameters(), first_pair.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        for ours, theirs in zip(student.parameters(), first_student.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bound", [1.0, 1.5, 2.7])
def test_a_ratio_aware_critic_stays_at_the_optimum(bound):
    """With the default penalty its start is the best critic at every state, so its gradient is exactly 0."""
    config = replace(CRITIC, bound=bound)
    student, pair = TinyStudent().float(), CriticPair(config, *SIZES, seed=3)
    start = [value.detach().clone() for value in pair.parameters()]
    positions, _ = collect_positions(student, batch_of(random_rows()))
    teacher = teacher_head()
    heads = Heads.of(student, Head(teacher.weight.float(), teacher.transform))
    metrics = critic_step(positions, heads, pair, config, chunk=7, update_number=0)
    assert metrics["critic/grad_norm"] == 0
    assert metrics["critic/teacher_text.d_mm"] > 0.1
    assert metrics["critic/teacher_text.loss"] == pytest.approx(
        -metrics["critic/teacher_text.d_mm"] / 2, rel=0.5
    )
    assert all(torch.equal(a, b) for a, b in zip(start, pair.parameters(), strict=True))


@pytest.mark.parametrize(
    "config",
    [replace(CRITIC, variance_penalty=3.0), replace(CRITIC, ratio_start=0.6)],
    ids=["penalty", "start"],
)
def test_a_ratio_aware_critic_away_from_the_optimum_learns(config):
    student, pair = TinyStudent(), critic_pair(config)
    positions, _ = collect_positions(student, batch_of(random_rows()))
    heads = Heads.of(student, teacher_head())
    losses = [
        critic_step(positions, heads, pair, config, chunk=7, update_number=0)["critic/teacher_text.loss"]
        for _ in range(20)
    ]
    assert losses[-1] < losses[0]


def test_critics_learn_from_tokens_only():
    """No probabilities of the teacher: the gap between the text and the policy rises, in sample, and
    the proxy's states are all the critic sees."""
    student, rows = TinyStudent(), random_rows()
    config = CriticConfig(features="teacher", learning_rate=1e-2, rank=16)
    critics, heads = critic_pair(config), Heads.of(student, teacher_head())
    positions, _ = collect_positions(student, batch_of(rows))
    seen = [
        critic_step(positions, heads, critics, config, chunk=1000, update_number=n, from_text=True)
        for n in range(40)
    ]
    gaps = [metrics["critic/teacher_text.d_mm"] for metrics in seen]
    assert gaps[0] == 0.0
    assert gaps[-1] > 0.3
    assert not any("tightness" in name for metrics in seen for name in metrics)


def test_a_text_only_teacher_trains_the_critics_through_its_tokens():
    """The proxy's probabilities are not what the critics learn from."""
    settings, rows = METHODS["blackbox"], rows_for(RECIPES["blackbox"])
    metrics, _, critics = run(settings, rows)
    by_tokens = critic_pair(settings.critic, shake=0.1)
    student = TinyStudent()
    positions, _ = collect_positions(student, batch_of(rows))
    heads = Heads.of(student, teacher_head())
    critic_step(positions, heads, by_tokens, settings.critic, chunk=7, update_number=1, from_text=True)
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
    metrics = critic_step(
        positions, heads, trained, config, chunk=7, update_number=0, discount=discount, from_text=from_text
    )
    for text in ("teacher_text", "student_text"):
        part, critic = positions.of(text), reference[text]
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
        assert metrics[f"critic/{text}.loss"] == pytest.approx(float(loss.detach()), abs=1e-12)
        d_mm = (weight * gap).sum() / weight.sum()
        assert metrics[f"critic/{text}.d_mm"] == pytest.approx(float(d_mm.detach()), abs=1e-12)
        for (which, ours), theirs in zip(trained[text].named_parameters(), critic.parameters(), strict=True):
            assert ours.grad is not None and ours.grad.abs().max() > 0, which
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=1e-9)


def test_exact_critics_weigh_positions_as_the_student_does():
    rows = random_rows()
    seen = run(METHODS["exact"], rows)[0]["critic/student_text.d_mm"]
    plain = replace(METHODS["exact"], credit=replace(METHODS["exact"].credit, form="practical"))
    assert seen != pytest.approx(run(plain, rows)[0]["critic/student_text.d_mm"])


def test_slices_are_never_empty():
    """More slices than the longest row has tokens would leave whole updates without a critic step."""
    student, rows = TinyStudent(), random_rows()
    positions, _ = collect_positions(student, batch_of(rows))
    heads, config = Heads.of(student, teacher_head()), replace(CRITIC, positions_per_step=1)
    for seed in range(20):
        critics = critic_pair(config)
        critic_step(positions, heads, critics, config, chunk=7, update_number=seed)
        assert any(parameter.grad is not None for parameter in critics.parameters()), seed


def test_critic_metrics_are_fresh_and_of_the_closed_form():
    """At the start of a ratio-aware critic the gap is Σ (q−p)²/(q+p) on the first slice."""
    student, rows = TinyStudent(), random_rows()
    config = CriticConfig(num_steps=2)
    positions, _ = collect_positions(student, batch_of(rows))
    heads = Heads.of(student, teacher_head())
    metrics = critic_step(positions, heads, critic_pair(config), config, chunk=100, update_number=0)
    for text in ("teacher_text", "student_text"):
        part = positions.of(text)
        part = part.select(part.step % 2 == 0)
        log_p, log_q = (
            head.logits(hidden).log_softmax(-1)
            for head, hidden in ((heads.student, part.student_hidden), (heads.teacher, part.teacher_hidden))
        )
        p, q = log_p.exp(), log_q.exp()
        best = closed_form_critic(log_p, log_q, 1.0, 2.0)
        gap = ((q - p) ** 2 / (q + p)).sum(-1).mean()
        assert metrics[f"critic/{text}.d_mm"] == pytest.approx(float(gap))
        assert metrics[f"critic/{text}.tightness"] == pytest.approx(1.0)
        saturated = ((p + q) / 2 * (best.abs() > 0.95)).sum(-1).mean()
        assert metrics[f"critic/{text}.saturation"] == pytest.approx(float(saturated))


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
        student_hidden=log_p, teacher_hidden=log_q, is_student_text=torch.arange(50) % 2 == 0, row=torch.arange(50),
        step=zeros, targets=zeros, behavior_logprobs=zeros.double(),
    )  # fmt: skip
    for features, expected in (("ratio", 1.0), ("teacher", 0.0)):
        config = CriticConfig(features=features, rank=8, num_steps=1)
        critics = critic_pair(config, sizes=(size, size))
        metrics = critic_step(positions, heads, critics, config, chunk=100, update_number=0)
        for text in ("teacher_text", "student_text"):
            assert metrics[f"critic/{text}.tightness"] == pytest.approx(expected, abs=1e-4)


def test_a_warm_up_update_makes_short_steps(monkeypatch):
    student, critics = TinyStudent(), critic_pair(CRITIC)
    positions, _ = collect_positions(student, batch_of(random_rows()))
    heads = Heads.of(student, teacher_head())
    steps = []
    monkeypatch.setattr(critic_step_module, "WARMUP_POSITIONS", 5)
    monkeypatch.setattr(critics, "step", lambda: steps.append(1) or torch.zeros(()))
    critic_step(positions, heads, critics, CRITIC, chunk=7, update_number=0)
    assert len(steps) == CRITIC.num_steps
    critic_step(positions, heads, critics, CRITIC, chunk=7, update_number=0, warmup=True)
    longest = int(positions.step.max()) + 1  # a slice is a place in the row
    assert len(steps) == CRITIC.num_steps + min(math.ceil(len(positions) / 5), longest) > 2 * CRITIC.num_steps


def test_smaller_slices(monkeypatch):
    """As many steps on fewer positions: every M-th token of every row."""
    student, critics = TinyStudent(), critic_pair(CRITIC)
    positions, _ = collect_positions(student, batch_of(random_rows()))
    heads = Heads.of(student, teacher_head())
    seen = []
    gradient = critic_step_module._critic_gradient

    def recording(part, *rest):
        seen.append(part)
        return gradient(part, *rest)

    monkeypatch.setattr(critic_step_module, "_critic_gradient", recording)
    config = replace(CRITIC, positions_per_step=12)
    critic_step(positions, heads, critics, config, chunk=7, update_number=2)
    num_slices = math.ceil(len(positions) / 12)
    assert num_slices > CRITIC.num_steps
    for text in ("teacher_text", "student_text"):
        parts = [part for part in seen if bool(part.is_student_text[0]) == (text == "student_text")]
        assert len(parts) == CRITIC.num_steps
        assert {int(s) for part in parts for s in (part.step + 2) % num_slices} == set(
            range(CRITIC.num_steps)
        )


def test_a_warm_up_update_moves_only_the_critics():
    student, critics = TinyStudent(), critic_pair(CRITIC, shake=0.1)
    before = [value.detach().clone() for value in student.parameters()]
    start = [value.detach().clone() for value in critics.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    metrics = update(
        student, optimizer, batch_of(random_rows()), teacher_head(), critics, METHODS["ammd"], update_number=0,
        warmup=True,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(start, critics.parameters(), strict=True))
    assert all(name.startswith("critic/") for name in metrics)
