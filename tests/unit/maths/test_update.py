"""An update against a reference without packs, chunks or shared work, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.config import CreditConfig, MethodConfig, RecipeConfig
from distill.errors import Diverged
from distill.objectives import moment_gap, policy_gradient
from distill.run.metrics import name_violations
from learner.model import chunked
from learner.model.head import Head, LogitTransform
from learner.update.credit_step import assign_credit
from learner.update.diagnostics import of_gradients
from learner.update.losses import position_losses
from learner.update.positions import Heads, Policies, collect_positions
from learner.update.student_step import student_step
from learner.update.update import update
from learner.update.witness import witnesses
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
from tests.unit.maths.methods import CRITIC, LEARNER, METHODS, RECIPES, assert_same, method, rows_for, run
from tests.unit.maths.slow import slow_loss


def check_against_slow(settings: MethodConfig, rows: list[Row]) -> None:
    metrics, grads, critics = run(settings, rows, [list(range(len(rows)))])
    student = TinyStudent()
    loss = slow_loss(settings, rows, student, teacher_head(), critics)
    loss.backward()
    assert metrics["policy/loss"] == pytest.approx(float(loss.detach()), abs=1e-7)
    for parameter_name, parameter in student.named_parameters():
        torch.testing.assert_close(grads[parameter_name], parameter.grad, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("zero_sum", [False, True])
def test_the_students_step_is_the_gradient_of_the_equations(name, zero_sum):
    settings = replace(METHODS[name], critic=replace(METHODS[name].critic, zero_sum=zero_sum))
    check_against_slow(settings, rows_for(settings.recipe))


@pytest.mark.parametrize("name", [name for name in METHODS if RECIPES[name].uses_student_text])
def test_student_text_can_leave_tokens_out(name):
    """Tokens that the loss leaves out have no loss and no cost, and the ratios after them are unchanged."""
    rows = [
        replace(row, counted=[t % 3 != 1 for t in range(len(row.response))]) if row.is_student_text else row
        for row in rows_for(RECIPES[name])
    ]
    check_against_slow(METHODS[name], rows)


@pytest.mark.parametrize("name", ["ammd", "ammd_paper", "gkd", "sft", "exact", "minillm", "sign", "dense"])
def test_packing_micro_batches_and_chunks_do_not_matter(monkeypatch, name):
    settings, rows = METHODS[name], rows_for(RECIPES[name])
    n = len(rows)
    one_each = run(settings, rows)
    assert_same(one_each, run(settings, rows, [list(range(n))]))
    assert_same(one_each, run(settings, rows, [list(range(n // 2, n))[::-1], list(range(n // 2))]))
    monkeypatch.setattr(chunked, "_BLOCK_BYTES", 3 * 4 * VOCABULARY)
    for chunk in (1, 5, 1000):
        small = replace(settings, learner=replace(LEARNER, vocabulary_chunk=chunk))
        assert_same(one_each, run(small, rows, [list(range(n))]))


@pytest.mark.parametrize("name", ["ammd", "ammd_paper", "gkd"])
def test_kept_activations_save_the_second_pass_and_change_nothing(name):
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
    critics_pass = len(rows) if settings.recipe.loss_is_game else 0
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


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("dense", "blackbox", "sft", "sft_exact")]
)
def test_a_student_equal_to_the_teacher_does_not_move(name):
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
    metrics = update(student, optimizer, batch_of(rows), teacher, learned, settings, update_number=1)
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


def test_policy_metrics():
    rows = random_rows()
    student, teacher = TinyStudent(), teacher_head()
    metrics, _, _ = run(METHODS["ammd"], rows, student=student)
    student = TinyStudent()
    tv: dict[str, list[float]] = {"teacher_text": [], "student_text": [], "first": [], "last": []}
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
        if row.is_student_text:
            tv["first"] += distance[:third]
            tv["last"] += distance[len(distance) - third :]
            behavior += [float(row.behavior[t] - log_p[t, y]) for t, y in enumerate(row.response)]
            entropies += (-(log_p.exp() * log_p).sum(-1)).tolist()
        tv["student_text" if row.is_student_text else "teacher_text"] += [
            d for d, c in zip(distance, row.counted, strict=True) if c
        ]
        p, log_q = log_p.exp(), q.log()
        for found, values in ((forward, q * (log_q - log_p)), (reverse, p * (log_p - log_q))):
            found[row.is_student_text] += values.sum(-1)[torch.tensor(row.counted)].tolist()
    expected = {
        "policy/teacher_text.tv": tv["teacher_text"], "policy/student_text.tv": tv["student_text"], "policy/student_text.tv_early": tv["first"],
        "policy/student_text.tv_late": tv["last"], "policy/behavior_gap": behavior, "policy/student_text.entropy": entropies,
        "policy/teacher_text.forward_kl": forward[False], "policy/student_text.forward_kl": forward[True],
        "policy/teacher_text.reverse_kl": reverse[False], "policy/student_text.reverse_kl": reverse[True],
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
    squares = [
        of_gradients(Policies(*(value[i : i + 1] for value in both)), f[[i]], targets[[i]], advantage[[i]])
        for i in range(5)
    ]
    z.requires_grad_()
    logprobs = z.log_softmax(-1)
    losses = {
        "direct": moment_gap(logprobs, both.teacher_logprobs, f),
        "long": policy_gradient(logprobs, targets, advantage),
    }
    for name, loss in losses.items():
        (gradient,) = torch.autograd.grad(loss.sum(), z, retain_graph=True)
        found = torch.stack([each[f"{name}_gradient_square"] for each in squares])
        torch.testing.assert_close(found, gradient.square().sum(-1))


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
    on = collect_positions(student, batch)[0].of("student_text")
    witness = witnesses(fixed, critics, heads)["student_text"]
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


def test_a_text_recipe_needs_neither_teacher_nor_payload():
    rows = rows_for(RECIPES["sft"])
    batch = batch_of(rows)
    bare = replace(batch, packs=tuple(replace(pack, teacher_hidden=None) for pack in batch.packs))
    student = TinyStudent()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    metrics = update(student, optimizer, bare, None, None, METHODS["sft"], update_number=0)
    assert metrics["policy/loss"] == pytest.approx(run(METHODS["sft"], rows)[0]["policy/loss"])
    with pytest.raises(ValueError, match="teacher states"):
        student_step(student, optimizer, bare, Heads.of(student, teacher_head()), None, METHODS["kd"])
    with pytest.raises(ValueError, match="needs the teacher's head"):
        update(student, optimizer, bare, None, None, METHODS["kd"], update_number=0)


def test_a_non_finite_loss_stops_before_the_step():
    student = TinyStudent()
    with torch.no_grad():
        student.embedding[:] = torch.nan
    before = student.head_weight.detach().clone()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    with pytest.raises(
        Diverged,
        match=r"^the student's loss and gradient norm=nan, \S+ must be finite; lower learner\.learning_rate",
    ):
        heads = Heads.of(student, teacher_head())
        student_step(student, optimizer, batch_of(random_rows()), heads, None, METHODS["anchor_only"])
    assert torch.equal(before, student.head_weight)


def test_costs_before_the_students_step_are_the_gaps_it_minimises():
    student, rows = TinyStudent(), random_rows()
    settings = method(credit=CreditConfig(span="own", normalize="none", baseline="none", ratio="none"))
    critics, heads = critic_pair(CRITIC, shake=0.2), Heads.of(student, teacher_head())
    batch = batch_of(rows)
    positions, _ = collect_positions(student, batch)
    witness_of = witnesses(CRITIC, critics, heads)
    on = positions.of("student_text")
    credit = assign_credit(
        on, batch.group, heads, witness_of["student_text"], settings.recipe, settings.credit, chunk=5
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    metrics = student_step(student, optimizer, batch, heads, witness_of, settings)
    gaps = credit.advantage[on.row, on.step]
    assert metrics["policy/student_text.moment_gap"] == pytest.approx(float(gaps.mean()))


def test_masked_positions_influence_nothing():
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
    loss = position_losses(
        RECIPES["ammd"], "teacher_text", both, targets, f=f, variance_penalty=penalty
    ).sum()
    grads = torch.autograd.grad(loss, [logits, teacher, f], allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None
