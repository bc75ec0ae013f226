"""The replay index, one behaviour at a time; the interleavings are in test_index_model."""

from __future__ import annotations

import json

import pytest

from distill.interfaces import Draw
from distill.replay.ledger import ReplayError, TrainedDraws, VersionHistory
from distill.replay.payload_cache import PayloadCache, SegmentLedger
from tests.unit.replay.builders import (
    Settings,
    fill,
    group,
    numbers,
    open_index,
    score_everything,
    text_group,
    train,
)

LATE = "its group came twice, or late from an actor that lost the draw; drop the group$"


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
    assert index.lease(0) is None, "four groups would do, but seven were asked for"
    index.insert([group(draws[6])])
    score_everything(index)
    assert index.lease(0) is not None


def test_min_size_is_capped_where_the_run_ends():
    index = open_index(num_updates=2, max_policy_age=1, prompts_per_update=2, min_size_to_sample=4)
    fill(index)
    train(index, 0)
    assert numbers(index, 1) == [2, 3], "only two groups can still be there"


def test_student_groups_are_used_in_draw_order_whatever_is_ready_first():
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


def test_ages_count_updates_between_the_oldest_token_and_the_use():
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


def test_an_unannounced_version_counts_as_the_newest_known():
    versions = VersionHistory([(0, 0), (3, 1), (5, 2)])
    assert [versions.made_at(version) for version in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_a_version_is_never_used_twice():
    index = open_index()
    index.advance(0, 1)  # the same announcement again is harmless
    fill(index)
    assert index.lease(0)
    index.acknowledge(0)
    with pytest.raises(
        ReplayError, match=r"^policy_version=1 must be above the newest one \(1\).*; persist the counter"
    ):
        index.advance(1, 1)


def test_a_group_older_than_the_bound_is_an_error():
    index = open_index(max_policy_age=1, num_updates=8)
    fill(index)
    for update in range(3):
        train(index, update)
        fill(index, version=1)  # weights that are long replaced
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


def test_a_lease_is_the_same_until_its_update_is_committed():
    index = open_index(max_policy_age=2)
    fill(index)
    first = index.lease(0)
    assert index.lease(0) is first
    index.acknowledge(0)
    second = index.lease(1)
    index.acknowledge(1)
    assert index.lease(0) is first, "the checkpoint of update 0 never became durable"
    assert index.updates_acknowledged == 0
    index.acknowledge(0)
    assert index.lease(1) is second
    index.commit(1)
    with pytest.raises(
        ReplayError, match=r"^update=0 must lie in \[1, 2\].*; resume from the newest checkpoint$"
    ):
        index.lease(0)


@pytest.mark.parametrize(("call", "value"), [("lease", 1), ("acknowledge", 0), ("commit", 1), ("advance", 1)])
def test_updates_come_in_order(call, value):
    index = open_index()
    fill(index)
    with pytest.raises(ReplayError, match=r"^update(s_done)?=\d must .*; \w"):
        index.advance(value, 9) if call == "advance" else getattr(index, call)(value)


def test_groups_that_nobody_expects_are_refused():
    index = open_index()
    draws = index.admit(2)
    index.insert([group(draws[0])])
    with pytest.raises(ReplayError, match=rf"^draw student_text-0-0=generated must be dispatched: {LATE}"):
        index.insert([group(draws[1]), group(draws[0])])
    stranger = Draw(table="student_text", number=99, epoch=0, index=0)
    with pytest.raises(ReplayError, match=rf"^draw student_text-0-99=unknown.* must be dispatched: {LATE}"):
        index.insert([group(stranger)])
    with pytest.raises(
        ReplayError, match=r"^groups=\['student_text-0-1', 'student_text-0-1'\] must be of different draws$"
    ):
        index.insert([group(draws[1]), group(draws[1])])
    with pytest.raises(
        ReplayError, match=r"^oldest_version of draw student_text-0-1=None must be a policy version$"
    ):
        index.insert([group(draws[1], version=None)])
    index.insert([group(draws[1])])  # the refused calls changed nothing


def test_a_refused_scoring_changes_nothing():
    index = open_index()
    index.insert([group(index.admit(1)[0])])
    job = index.take_for_scoring(8)
    late = Draw(table="teacher_text", number=77, epoch=0, index=0)
    with pytest.raises(
        ReplayError,
        match=r"^draw teacher_text-0-77=unknown or trained must be dispatched: its row came twice, .*; drop the row$",
    ):
        index.insert_scored([group(job.groups[0].draw), text_group(late)])
    assert index.stats()["replay/student_text.scored"] == 0
    index.insert_scored([group(job.groups[0].draw)])


def test_draws_of_a_dead_rollout_actor_come_first():
    index = open_index(max_policy_age=1)
    draws = index.admit(2)
    assert index.requeue([draw.draw_id for draw in draws[:1]]) == 1
    with pytest.raises(ReplayError, match=rf"^draw student_text-0-0=drawn must be dispatched: {LATE}"):
        index.insert([group(draws[0])])
    assert [draw.number for draw in index.admit(8)] == [0, 2, 3]


def test_work_of_a_dead_teacher_is_handed_out_again():
    index = open_index()
    index.insert([group(draw) for draw in index.admit(2)])
    job = index.take_for_scoring(64)
    held = [ref.draw.draw_id for ref in job.groups] + [draw.draw_id for draw in job.teacher_draws]
    assert not index.take_for_scoring(64)
    assert index.requeue(held, "rollout") == 0, "a rollout actor does not hold what is being scored"
    assert index.requeue(held, "scoring") == len(held)
    with pytest.raises(
        ReplayError,
        match=r"^draw student_text-0-0 must be with a teacher to be scored: its job was given back; drop the group$",
    ):
        index.insert_scored([group(job.groups[0].draw)])
    assert index.take_for_scoring(64) == job


def test_a_corpus_row_is_scored_once_and_shared_by_later_draws():
    index = open_index(student_text="none", num_corpus_rows=2, num_updates=6, max_policy_age=1)
    job = index.take_for_scoring(64)
    assert sorted(draw.index for draw in job.teacher_draws) == [0, 1], "six draws fall on two rows"
    assert not index.take_for_scoring(64)
    index.insert_scored([text_group(draw) for draw in job.teacher_draws])
    for update in range(6):
        refs = index.lease(update).groups
        assert [ref.draw.number for ref in refs] == [2 * update, 2 * update + 1]
        train(index, update)
    assert not index.take_for_scoring(64)
    assert index.stats()["replay/bytes"] == 200


def test_text_is_prefetched_one_update_beyond_the_age_bound():
    index = open_index(student_text="none", num_corpus_rows=50, max_policy_age=1, num_updates=8)
    assert [draw.number for draw in index.take_for_scoring(64).teacher_draws] == [0, 1, 2, 3, 4, 5]


def test_payload_over_the_bound_goes_least_recently_used_first_but_never_from_the_window():
    index = open_index(
        student_text="none", num_corpus_rows=20, max_policy_age=0, num_updates=20, max_bytes=450
    )
    for update in range(8):
        score_everything(index)
        assert index.lease(update) is not None
        train(index, update)
        index.commit(update + 1)
        assert index.stats()["replay/bytes"] <= 450
    assert index.stats()["replay/num_evicted_rows"] > 0


def test_the_row_used_last_stays_longest():
    segments = SegmentLedger()
    cache = PayloadCache(segments, max_bytes=250)
    rows = [Draw(table="teacher_text", number=number, epoch=0, index=number) for number in range(3)]
    for row in rows[:2]:
        cache.put(row.index, text_group(row))
    cache.pin(0)
    cache.unpin(0)
    cache.put(2, text_group(rows[2]))
    cache.evict()
    assert [cache.pin(index) is not None for index in range(3)] == [True, False, True]


def test_nothing_of_the_window_is_evicted():
    index = open_index(student_text="none", num_corpus_rows=20, num_updates=20, max_bytes=1)
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


def test_state_holds_what_is_acknowledged_and_loads_from_json():
    index = open_index(num_updates=6, max_policy_age=1)
    fill(index)
    train(index, 0)
    fill(index, version=2)
    assert index.lease(1) is not None  # leased, never applied
    state = json.loads(json.dumps(index.state()))
    assert state["updates_done"] == 1
    assert state["student_trained"] == {"prefix": 2, "extra": []}

    resumed = Settings(num_updates=6, max_policy_age=1).index()
    resumed.load_state(state)
    assert resumed.admit(8) == [], "the engines do not hold the checkpoint's weights yet"
    resumed.advance(1, 7)
    assert [draw.number for draw in resumed.admit(8)] == [2, 3, 4, 5]
    assert resumed.take_for_scoring(64).teacher_draws[0].number == 2


@pytest.mark.parametrize("max_policy_age", [0, 2])
def test_a_share_grows_from_the_first_update_that_is_not_admitted(max_policy_age):
    settings = {"student_text": "mixed", "student_fraction": 0.0, "fraction_step": 0.5,
                "max_policy_age": max_policy_age, "num_updates": 12}  # fmt: skip
    index = open_index(**settings)
    kinds = []
    for update in range(12):
        fill(index, update + 1)
        kinds.append(bool(numbers(index, update)))
        train(index, update)
        if update == 3:
            index.set_student_share(1.0)
            state = json.loads(json.dumps(index.state()))
    # advance(4) had admitted the text of the updates before this one
    grown = 4 + max_policy_age + 2
    assert kinds == [False] * grown + [True] * (12 - grown)
    resumed = Settings(**settings).index()
    resumed.load_state(state)
    resumed.advance(4, 5)
    for update in range(4, 12):
        fill(resumed, update + 1)
        assert bool(numbers(resumed, update)) == kinds[update]
        train(resumed, update)


def test_state_of_another_plan_is_refused():
    index = Settings(prompts_per_update=2).index()
    state = index.state() | {"updates_done": 1, "student_trained": {"prefix": 3, "extra": []}}
    with pytest.raises(
        ReplayError,
        match=r"^student_trained=3\+0 must be the 2 draws of 1 updates.*; resume with its config$",
    ):
        index.load_state(state)


def test_trained_draws_stay_compact():
    trained = TrainedDraws()
    for number in (1, 2, 5, 0, 5):
        trained.add(number)
    assert trained.to_json() == {"prefix": 3, "extra": [5]}
    assert (len(trained), 4 in trained, 5 in trained) == (4, False, True)
    assert TrainedDraws.from_json(trained.to_json()).to_json() == trained.to_json()
    assert trained.with_numbers([3, 4]).to_json() == {"prefix": 6, "extra": []}
    assert len(trained) == 4


def test_a_learner_that_went_back_gets_its_leases_and_over_age_rollouts_are_repeated():
    index = open_index(max_policy_age=1, num_updates=10)
    for update in range(4):
        fill(index, version=update + 1)
        train(index, update)
    in_flight = index.admit(8)
    assert [draw.number for draw in in_flight] == [10, 11]
    index.commit(1)
    index.advance(1, 20)  # restarted from the checkpoint of update 1
    index.insert([group(draw, version=20) for draw in in_flight])
    score_everything(index)
    for update, version in ((1, 21), (2, 22), (3, 23), (4, 24)):
        assert numbers(index, update) == [2 * update, 2 * update + 1]
        index.acknowledge(update)
        index.advance(update + 1, version)
    assert index.lease(5) is None, "its rollouts hold tokens of update 1"
    assert [draw.number for draw in index.admit(2)] == [10, 11]


REUSE = {"samples_per_insert": 1.0, "max_times_sampled": 2, "max_policy_age": 1, "num_updates": 9}


def test_trained_draws_are_skipped_when_a_reusing_run_resumes():
    index = Settings(**REUSE).index()
    state = index.state() | {"updates_done": 2, "student_trained": {"prefix": 1, "extra": [2, 4]}}
    index.load_state(state)
    index.advance(2, 3)
    assert [draw.number for draw in index.admit(100)] == [1, 3, 5, 6, 7], (
        "eight inserts, three of them trained"
    )


def test_a_group_that_got_too_old_unused_is_rolled_out_again_before_new_draws():
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
    assert len(draws) == 4, "in the place of new draws, not beside them"
    assert index.stats()["replay/num_expired"] == len(unused)
