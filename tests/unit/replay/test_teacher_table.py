"""Teacher draws: scoring, prefetch and the payload cache; and when segments become free."""

from __future__ import annotations

from distill.interfaces import Draw
from distill.replay.payload_cache import PayloadCache, SegmentUse
from tests.unit.replay.builders import (
    group,
    open_index,
    score_everything,
    teacher_group,
    train,
)


def test_a_corpus_row_is_scored_once_and_shared_by_later_draws():
    index = open_index(student_text="none", num_teacher_rows=2, num_updates=6, max_policy_age=1)
    job = index.take_for_scoring(64)
    assert sorted(draw.index for draw in job.teacher_draws) == [0, 1], "six draws fall on two rows"
    assert not index.take_for_scoring(64)
    index.insert_scored([teacher_group(draw) for draw in job.teacher_draws])
    for update in range(6):
        refs = index.lease(update).groups
        assert [ref.draw.number for ref in refs] == [2 * update, 2 * update + 1]
        train(index, update)
    assert not index.take_for_scoring(64)
    assert index.stats()["replay/bytes"] == 200


def test_teacher_rows_are_scored_one_update_beyond_the_age_bound():
    index = open_index(student_text="none", num_teacher_rows=50, max_policy_age=1, num_updates=8)
    assert [draw.number for draw in index.take_for_scoring(64).teacher_draws] == [0, 1, 2, 3, 4, 5]


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
        cache.put(row.index, teacher_group(row))
    cache.pin(0)
    cache.unpin(0)
    cache.put(2, teacher_group(rows[2]))
    cache.evict()
    assert [cache.pin(index) is not None for index in range(3)] == [True, False, True]


def test_rows_of_admitted_draws_are_never_evicted():
    index = open_index(student_text="none", num_teacher_rows=20, num_updates=20, max_bytes=1)
    score_everything(index)
    assert index.stats()["replay/bytes"] == 600
    assert index.lease(0) is not None


def test_segments_are_freed_when_their_last_group_is_final():
    index = open_index(student_text="every_update", teacher_text="none", num_updates=3)
    draws = index.admit(4)
    index.insert([group(draw, segment="rollout-1-0.arrow") for draw in draws])
    assert index.freed_segments("rollout-1") == {}
    job = index.take_for_scoring(64)
    index.insert_scored([group(ref.draw, 1, "teacher-0.arrow") for ref in job.groups])
    assert index.freed_segments("rollout") == {}, "another writer's"
    assert index.freed_segments("rollout-1") == {"rollout-1-0.arrow": 4}
    assert index.freed_segments("rollout-1") == {}
    train(index, 0)
    train(index, 1)
    index.commit(1)
    assert index.freed_segments("teacher") == {}
    index.commit(2)
    assert index.freed_segments("teacher") == {"teacher-0.arrow": 4}
    assert index.stats()["replay/bytes"] == 0


def test_a_group_that_stays_where_it_is_when_scored_is_counted_once():
    index = open_index(teacher_text="none", num_updates=1)
    draws = index.admit(2)
    index.insert([group(draw) for draw in draws])
    index.insert_scored(list(index.take_for_scoring(8).groups))
    train(index, 0)
    index.commit(1)
    assert index.freed_segments("rollout") == {"rollout-0.arrow": 2}
