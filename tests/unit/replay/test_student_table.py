"""Student draws: admission, order of use, age and re-use."""

from __future__ import annotations

import pytest

from distill.replay.ledger import ReplayError
from tests.unit.replay.builders import (
    Settings,
    fill,
    group,
    numbers,
    open_index,
    score_everything,
    train,
)

LATE = "its group arrived twice, or late from an actor that lost the draw; drop the group$"


def test_admission_waits_for_the_first_push():
    index = Settings().index()
    assert index.admit(8) == []
    index.advance(0, 1)
    assert [draw.number for draw in index.admit(8)] == [0, 1, 2, 3]


def test_admission_is_bounded_by_age_and_run_length():
    index = open_index(num_updates=3, max_policy_age=1, prompts_per_update=2)
    fill(index)
    assert index.admit(8) == []
    train(index, 0)
    assert [draw.number for draw in index.admit(8)] == [4, 5]
    train(index, 1)
    assert index.admit(8) == [], "the run ends after three updates"


def test_samples_per_insert_admits_fewer_draws():
    index = open_index(samples_per_insert=2, max_times_sampled=3, max_policy_age=2, prompts_per_update=3)
    assert len(index.admit(100)) == 5  # ceil(3 * 3 / 2)


def test_min_size_admits_enough_to_be_met():
    index = open_index(
        samples_per_insert=2,
        max_times_sampled=2,
        max_policy_age=1,
        prompts_per_update=4,
        min_size_to_sample=7,
    )
    draws = index.admit(100)
    assert len(draws) == 7
    index.insert([group(draw) for draw in draws[:6]])
    score_everything(index)
    assert index.lease(0) is None, "four groups would suffice, but min_size_to_sample is seven"
    index.insert([group(draws[6])])
    score_everything(index)
    assert index.lease(0) is not None


def test_min_size_is_capped_where_the_run_ends():
    index = open_index(num_updates=2, max_policy_age=1, prompts_per_update=2, min_size_to_sample=4)
    fill(index)
    train(index, 0)
    assert numbers(index, 1) == [2, 3], "only two groups can still exist"


def test_student_groups_are_used_in_draw_order_regardless_of_completion_order():
    index = open_index(max_policy_age=1)
    draws = index.admit(4)
    score_everything(index)
    index.insert([group(draws[3]), group(draws[2]), group(draws[1])])
    score_everything(index)
    assert index.lease(0) is None
    index.insert([group(draws[0])])
    score_everything(index)
    assert numbers(index, 0) == [0, 1]
    assert numbers(index, 0, "teacher_text") == [0, 1]


def test_ages_count_updates_from_the_oldest_token_to_its_use():
    index = open_index(max_policy_age=2, num_updates=6)
    fill(index)
    train(index, 0)
    later = index.admit(2)
    assert [draw.number for draw in later] == [6, 7]
    index.insert([group(draw, version=2) for draw in later])
    score_everything(index)
    ages = []
    for update in range(1, 4):
        ages.append(index.lease(update).policy_ages)
        train(index, update)
    assert ages == [(1, 1), (2, 2), (2, 2)]


def test_a_group_older_than_the_bound_is_an_error():
    index = open_index(max_policy_age=1, num_updates=8)
    fill(index)
    for update in range(3):
        train(index, update)
        fill(index, version=1)  # weights replaced long ago
        if update == 1:
            break
    with pytest.raises(
        ReplayError,
        match=r"^age=2 of draw student_text-0-4 in update 2 must be <= replay\.max_policy_age \(1\)",
    ):
        index.lease(2)


def test_reuse_draws_without_replacement_and_up_to_the_bound():
    index = open_index(
        samples_per_insert=2, max_times_sampled=2, max_policy_age=3, prompts_per_update=2, num_updates=6
    )
    used: list[int] = []
    for update in range(6):
        fill(index, version=update + 1)
        chosen = numbers(index, update)
        assert len(set(chosen)) == 2
        assert chosen == sorted(chosen)
        used += chosen
        train(index, update)
    assert max(used.count(number) for number in used) == 2
    assert used != sorted(used)


def test_draws_of_a_dead_rollout_actor_are_issued_first():
    index = open_index(max_policy_age=1)
    draws = index.admit(2)
    assert index.requeue([draw.draw_id for draw in draws[:1]]) == 1
    with pytest.raises(ReplayError, match=rf"^draw student_text-0-0=drawn must be dispatched; {LATE}"):
        index.insert([group(draws[0])])
    assert [draw.number for draw in index.admit(8)] == [0, 2, 3]


REUSE = {"samples_per_insert": 1.0, "max_times_sampled": 2, "max_policy_age": 1, "num_updates": 9}


def test_trained_draws_are_skipped_when_a_reusing_run_resumes():
    index = Settings(**REUSE).index()
    state = index.state() | {"updates_done": 2, "student_trained": {"prefix": 1, "extra": [2, 4]}}
    index.load_state(state)
    index.advance(2, 3)
    assert [draw.number for draw in index.admit(100)] == [1, 3, 5, 6, 7], (
        "eight inserts, three of them trained"
    )


def test_an_unused_group_that_became_too_old_is_rolled_out_before_new_draws():
    index = open_index(**REUSE)
    fill(index)
    unused = set(range(4))
    for update in range(2):
        unused -= set(numbers(index, update))
        train(index, update)
    assert unused, "choose a seed that leaves one unused"
    draws = [draw.number for draw in index.admit(100)]
    assert draws[: len(unused)] == sorted(unused)
    assert draws[len(unused) :] == list(range(4, 4 + len(draws) - len(unused)))
    assert len(draws) == 4, "instead of new draws, not in addition to them"
    assert index.stats()["replay/num_expired"] == len(unused)
