"""Teacher draws: scoring, prefetch and the payload cache; and which segments are live."""

from __future__ import annotations

from distill.interfaces import Draw, Holder
from distill.replay.payload_cache import PayloadCache, SegmentUse
from tests.unit.replay.builders import (
    ROLLOUT,
    TEACHER,
    admitted,
    draw_numbers,
    open_index,
    sample,
    score_everything,
    scored,
    train,
)


def test_a_corpus_row_is_scored_once_and_shared_by_later_draws():
    index = open_index(student_text="none", num_teacher_rows=2, num_updates=6, max_policy_age=1)
    work = index.take(TEACHER, 64)
    assert sorted(draw.index for draw in work) == [0, 1], "six draws fall on two rows"
    assert not index.take(TEACHER, 64)
    index.deliver(TEACHER, [scored(draw) for draw in work])
    for update in range(6):
        assert draw_numbers(index.lease(update).groups, "teacher_text") == [2 * update, 2 * update + 1]
        train(index, update)
    assert not index.take(TEACHER, 64)
    assert index.stats()["replay/bytes"] == 200


def test_teacher_rows_are_scored_one_update_beyond_the_age_bound():
    index = open_index(student_text="none", num_teacher_rows=50, max_policy_age=1, num_updates=8)
    assert [draw.number for draw in index.take(TEACHER, 64)] == [0, 1, 2, 3, 4, 5]


def test_rows_of_a_dead_teacher_are_scored_by_another():
    index = open_index(student_text="none", num_teacher_rows=50, max_policy_age=1, num_updates=8)
    first = index.take(TEACHER, 3)
    rest = index.take(Holder("teacher", 1), 64)
    assert index.deliver(TEACHER, [scored(first[0])]) == []
    assert index.forget(TEACHER) == 2
    again = index.take(Holder("teacher", 1), 64)
    assert [draw.draw_id for draw in again] == [draw.draw_id for draw in first[1:]]
    assert index.deliver(TEACHER, [scored(first[1])]) == [scored(first[1]).work_id]
    index.deliver(Holder("teacher", 1), [scored(draw) for draw in [*rest, *again]])
    assert draw_numbers(index.lease(0).groups, "teacher_text") == [0, 1]


def test_in_lock_step_a_teacher_gets_the_rows_of_one_update_at_a_time():
    index = open_index(student_text="none", num_teacher_rows=50, max_policy_age=0, num_updates=8)
    assert [draw.number for draw in index.take(TEACHER, 1)] == [0, 1]
    assert [draw.number for draw in index.take(TEACHER, 1)] == [2, 3]


def test_payload_over_the_bound_is_evicted_but_never_that_of_admitted_draws():
    index = open_index(
        student_text="none", num_teacher_rows=20, max_policy_age=0, num_updates=20, max_bytes=450
    )
    for update in range(8):
        score_everything(index)
        assert index.lease(update) is not None
        train(index, update)
        index.commit(update + 1)
        assert index.stats()["replay/bytes"] <= 450
    assert index.stats()["replay/num_evicted_rows"] > 0


def test_the_row_used_last_stays_longest():
    segments = SegmentUse()
    cache = PayloadCache(segments, max_bytes=250)
    rows = [Draw(table="teacher_text", number=number, epoch=0, index=number) for number in range(3)]
    for row in rows[:2]:
        cache.put(row.index, scored(row))
    cache.pin(0)
    cache.unpin(0)
    cache.put(2, scored(rows[2]))
    cache.evict()
    assert [cache.pin(index) is not None for index in range(3)] == [True, False, True]


def test_rows_of_admitted_draws_are_never_evicted():
    index = open_index(student_text="none", num_teacher_rows=20, num_updates=20, max_bytes=1)
    score_everything(index)
    assert index.stats()["replay/bytes"] == 600
    assert index.lease(0) is not None


def test_a_segment_is_live_until_its_last_row_is_final():
    index = open_index(student_text="every_update", teacher_text="none", num_updates=3)
    names = ["rollout-0.0-0.arrow", "teacher-0.0-0.arrow", "rollout-9.0-0.arrow"]
    draws = admitted(index, 4)
    index.deliver(ROLLOUT, [sample(draw) for draw in draws])
    assert index.live_segments(names) == names[:1]
    work = index.take(TEACHER, 64)
    index.deliver(TEACHER, [scored(each) for each in work[:3]])
    assert index.live_segments(names) == names[:2]
    index.deliver(TEACHER, [scored(work[3])])
    assert index.live_segments(names) == names[1:2]
    assert index.live_segments(names) == names[1:2], "the question may be asked again"
    train(index, 0)
    train(index, 1)
    index.commit(1)
    assert index.live_segments(names) == names[1:2]
    index.commit(2)
    assert index.live_segments(names) == []
    assert index.stats()["replay/bytes"] == 0


def test_a_sample_that_stays_where_it_is_when_scored_is_counted_once():
    index = open_index(teacher_text="none", num_updates=1)
    index.deliver(ROLLOUT, [sample(draw) for draw in admitted(index, 2)])
    assert index.deliver(TEACHER, index.take(TEACHER, 8)) == []
    train(index, 0)
    index.commit(1)
    assert index.live_segments(["rollout-0.0-0.arrow"]) == []
    assert index.stats()["replay/bytes"] == 0
