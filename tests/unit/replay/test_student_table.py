"""Student draws: admission, order of use, age and re-use."""

from __future__ import annotations

import pytest

from distill.interfaces import Holder
from distill.replay.ledger import ReplayError
from tests.unit.replay.builders import (
    ROLLOUT,
    TEACHER,
    Settings,
    admitted,
    fill,
    insert,
    numbers,
    open_index,
    sample,
    score_everything,
    scored,
    train,
)


def test_admission_waits_for_the_first_push():
    index = Settings().index()
    assert admitted(index, 8) == []
    index.advance(0, 1)
    assert [draw.number for draw in admitted(index, 8)] == [0, 1, 2, 3]


def test_admission_is_bounded_by_age_and_run_length():
    index = open_index(num_updates=3, max_policy_age=1, prompts_per_update=2)
    fill(index)
    assert admitted(index, 8) == []
    train(index, 0)
    assert [draw.number for draw in admitted(index, 8)] == [4, 5]
    train(index, 1)
    assert admitted(index, 8) == [], "the run ends after three updates"


def test_samples_per_insert_admits_fewer_draws():
    index = open_index(samples_per_insert=2, max_times_sampled=3, max_policy_age=2, prompts_per_update=3)
    assert len(admitted(index, 100)) == 5  # ceil(3 * 3 / 2)


def test_min_size_admits_enough_to_be_met():
    index = open_index(
        samples_per_insert=2,
        max_times_sampled=2,
        max_policy_age=1,
        prompts_per_update=4,
        min_size_to_sample=7,
    )
    draws = admitted(index, 100)
    assert len(draws) == 7
    insert(index, draws[:6])
    score_everything(index)
    assert index.lease(0) is None, "four groups would suffice, but min_size_to_sample is seven"
    insert(index, draws[6:])
    score_everything(index)
    assert index.lease(0) is not None


def test_min_size_is_capped_where_the_run_ends():
    index = open_index(num_updates=2, max_policy_age=1, prompts_per_update=2, min_size_to_sample=4)
    fill(index)
    train(index, 0)
    assert numbers(index, 1) == [2, 3], "only two groups can still exist"


def test_student_groups_are_used_in_draw_order_regardless_of_completion_order():
    index = open_index(max_policy_age=1)
    draws = admitted(index, 4)
    score_everything(index)
    insert(index, draws[:0:-1])
    score_everything(index)
    assert index.lease(0) is None
    insert(index, draws[:1])
    score_everything(index)
    assert numbers(index, 0) == [0, 1]
    assert numbers(index, 0, "teacher_text") == [0, 1]


def test_ages_count_updates_from_the_oldest_token_to_its_use():
    index = open_index(max_policy_age=2, num_updates=6)
    fill(index)
    train(index, 0)
    later = admitted(index, 2)
    assert [draw.number for draw in later] == [6, 7]
    insert(index, later, version=2)
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
    draws = admitted(index, 2)
    assert index.deliver(ROLLOUT, [sample(draws[1])]) == []
    assert index.forget(ROLLOUT) == 1
    heir = Holder("rollout", 0, 1)
    again = admitted(index, 8, heir)
    assert [draw.number for draw in again] == [0, 2, 3]
    assert again[0].draw_id == draws[0].draw_id
    late = sample(draws[0])
    assert index.deliver(ROLLOUT, [late]) == [late.work_id]
    assert index.deliver(heir, [late]) == [late.work_id], "it is of an earlier issue"
    assert index.deliver(heir, [sample(again[0])]) == []


def test_a_group_is_complete_with_its_last_sample_and_each_is_scored_as_it_comes():
    index = open_index(max_policy_age=1, samples_per_prompt=3, teacher_text="none")
    first, second, *_ = admitted(index, 4)
    assert index.deliver(ROLLOUT, [sample(first, 1, number=2), sample(second, 1, number=0)]) == []
    work = index.take(TEACHER, 8)
    assert [(each.draw.number, each.sample) for each in work] == [(0, 2), (1, 0)]
    assert index.deliver(TEACHER, [scored(each) for each in work]) == []
    assert index.holdings.missing(ROLLOUT, [])
    index.deliver(ROLLOUT, [sample(first, 2, number=0), sample(first, 2, number=1)])
    assert index.stats()["replay/student_text.generated"] == 1
    score_everything(index)
    assert index.stats()["replay/student_text.scored"] == 1
    assert index.lease(0) is None, "draw 1 lacks two samples"
    index.deliver(ROLLOUT, [sample(second, 1, number=2), sample(second, 1, number=1)])
    score_everything(index)
    groups = index.lease(0).groups
    assert [[each.sample for each in group.samples] for group in groups] == [[0, 1, 2]] * 2
    assert {each.location.segment for group in groups for each in group.samples} == {"teacher-0.0-0.arrow"}


def test_what_a_dead_actor_left_of_a_group_is_dropped_also_where_a_teacher_has_it():
    index = open_index(max_policy_age=1, samples_per_prompt=2, teacher_text="none")
    [draw] = admitted(index, 1)
    index.deliver(ROLLOUT, [sample(draw)])
    [held] = index.take(TEACHER, 8)
    index.forget(ROLLOUT)
    assert index.stats()["replay/bytes"] == 0
    assert index.deliver(TEACHER, [scored(held)]) == [held.work_id]
    assert not index.holdings.missing(TEACHER, [])
    heir = Holder("rollout", 0, 1)
    [again] = admitted(index, 1, heir)
    index.deliver(heir, [sample(again), sample(again, number=1)])
    assert len(index.take(TEACHER, 8)) == 2


def test_in_lock_step_every_actor_gets_its_share_whenever_it_asks():
    settings = {"max_policy_age": 0, "prompts_per_update": 5, "num_rollouts": 2, "num_scorers": 3}
    index = open_index(**settings, teacher_text="none")
    odd, even = Holder("rollout", 1), Holder("rollout", 0)
    shares = {holder: admitted(index, 1, holder) for holder in (odd, even)}
    assert [draw.number for draw in shares[odd]] == [1, 3]
    assert [draw.number for draw in shares[even]] == [0, 2, 4]
    insert(index, shares[odd], holder=odd)
    assert not index.take(Holder("teacher", 1), 8), "a teacher starts when the whole update is rolled out"
    insert(index, shares[even], holder=even)
    jobs = [[each.draw.number for each in index.take(Holder("teacher", number), 1)] for number in (2, 0, 1)]
    assert jobs == [[2], [0, 3], [1, 4]]


REUSE = {"samples_per_insert": 1.0, "max_times_sampled": 2, "max_policy_age": 1, "num_updates": 9}


def test_trained_draws_are_skipped_when_a_reusing_run_resumes():
    index = Settings(**REUSE).index()
    state = index.state() | {"updates_done": 2, "student_trained": {"prefix": 1, "extra": [2, 4]}}
    index.load_state(state)
    index.advance(2, 3)
    assert [draw.number for draw in admitted(index, 100)] == [1, 3, 5, 6, 7], (
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
    draws = [draw.number for draw in admitted(index, 100)]
    assert draws[: len(unused)] == sorted(unused)
    assert draws[len(unused) :] == list(range(4, 4 + len(draws) - len(unused)))
    assert len(draws) == 4, "instead of new draws, not in addition to them"
    assert index.stats()["replay/num_expired"] == len(unused)
