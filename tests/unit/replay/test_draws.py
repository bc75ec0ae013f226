"""The data order and the plan of updates."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.config import LearnerConfig, RecipeConfig, RunConfig
from distill.errors import ConfigError
from distill.replay.draws import BatchPlan, DrawOrder
from tests.unit.replay.builders import Settings


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**64), st.integers(0, 3))
def test_an_epoch_draws_every_row_once(num_rows, seed, epoch):
    order = DrawOrder("student_text", num_rows, seed)
    draws = [order.draw(epoch * num_rows + place) for place in range(num_rows)]
    assert sorted(draw.index for draw in draws) == list(range(num_rows))
    assert {draw.epoch for draw in draws} == {epoch}


def test_a_draw_depends_only_on_its_number():
    forward = [DrawOrder("teacher_text", 9, 1).draw(number) for number in range(40)]
    order = DrawOrder("teacher_text", 9, 1)
    assert [order.draw(number) for number in reversed(range(40))][::-1] == forward


def test_orders_differ_by_seed_table_and_epoch():
    def indices(table, seed, epoch):
        return [DrawOrder(table, 50, seed).draw(epoch * 50 + place).index for place in range(50)]

    orders = [
        indices("student_text", 0, 0),
        indices("student_text", 0, 1),
        indices("student_text", 1, 0),
        indices("teacher_text", 0, 0),
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_an_empty_table_is_rejected():
    with pytest.raises(
        ConfigError,
        match=r"^rows of the teacher_text table=0 must be >= 1; use a data set with more rows$",
    ):
        DrawOrder("teacher_text", 0, 0)


def teacher_rows(plan: BatchPlan, update: int) -> int:
    return plan.teacher_through(update + 1) - plan.teacher_through(update)


@pytest.mark.parametrize(
    ("student_text", "teacher_text", "expected"),
    [
        ("none", "sampled", (0, 3)),
        ("every_update", "sampled", (2, 3)),
        ("every_update", "none", (2, 0)),
    ],
)
def test_plan_of_a_recipe(student_text, teacher_text, expected):
    plan = Settings(student_text=student_text, teacher_text=teacher_text, teacher_rows_per_update=3).plan
    for update in range(5):
        assert (plan.student_groups(update), teacher_rows(plan, update)) == expected
    assert (plan.student_through(5), plan.teacher_through(5)) == (5 * expected[0], 5 * expected[1])


def test_mixed_flips_one_coin_per_update():
    plan = Settings(student_text="mixed", teacher_rows_per_update=3).plan
    batches = [(plan.student_groups(update), teacher_rows(plan, update)) for update in range(200)]
    assert set(batches) == {(2, 0), (0, 3)}
    assert 60 < batches.count((2, 0)) < 140
    other = Settings(student_text="mixed", teacher_rows_per_update=3).plan
    assert other.student_groups(199) == batches[199][0], "a coin depends on earlier calls"
    assert plan.student_through(200) == sum(students for students, _ in batches)
    assert plan.teacher_through(200) == sum(rows for _, rows in batches)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, (0, 3)), (1.0, (2, 0))])
def test_mixed_with_fraction_zero_and_one(fraction, expected):
    config = RunConfig(
        recipe=RecipeConfig(student_text="mixed", student_fraction=fraction),
        learner=LearnerConfig(prompts_per_update=2, teacher_rows_per_update=3),
    )
    plan = BatchPlan.of(config)
    assert {(plan.student_groups(update), teacher_rows(plan, update)) for update in range(20)} == {expected}


def test_a_share_set_later_changes_only_later_updates():
    fixed, plan = (Settings(student_text="mixed", teacher_rows_per_update=3).plan for _ in range(2))
    before = [fixed.student_groups(update) for update in range(50)]
    assert [plan.student_groups(update) for update in range(50)] == before
    plan.set_share(20, 1.0)
    assert [plan.student_groups(update) for update in range(20)] == before[:20]
    assert {plan.student_groups(update) for update in range(20, 50)} == {2}
    plan.set_share(20, 0.0)
    assert {teacher_rows(plan, update) for update in range(20, 50)} == {3}, (
        "set again from the same update on"
    )
    plan.set_share(30, 1.0)
    loaded = Settings(student_text="mixed", teacher_rows_per_update=3).plan
    assert loaded.teacher_through(40) != plan.teacher_through(40)
    loaded.load_shares(plan.shares)
    assert [loaded.teacher_through(u) for u in range(50)] == [plan.teacher_through(u) for u in range(50)]
