"""The index between its tables: leases, versions, rejected calls, checkpoints. Interleavings: test_index_model."""

from __future__ import annotations

import json

import pytest

from distill.interfaces import Draw, Holder
from distill.replay.ledger import ReplayError, TrainedDraws, VersionHistory
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

OTHER = Holder("rollout", 1)


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
        ReplayError, match=r"^update=0 must be in \[1, 2\].*; resume from the newest checkpoint$"
    ):
        index.lease(0)


@pytest.mark.parametrize(("call", "value"), [("lease", 1), ("acknowledge", 0), ("commit", 1), ("advance", 1)])
def test_updates_out_of_order_are_rejected(call, value):
    index = open_index()
    fill(index)
    with pytest.raises(ReplayError, match=r"^update(s_done)?=\d must .*; \w"):
        index.advance(value, 9) if call == "advance" else getattr(index, call)(value)


def test_what_no_draw_waits_for_is_refused_and_disturbs_nothing():
    index = open_index()
    mine, others = admitted(index, 2), admitted(index, 2, OTHER)
    accepted = sample(mine[0])
    assert index.deliver(ROLLOUT, [accepted]) == []
    stranger = sample(Draw(table="student_text", number=99, epoch=0, index=0))
    second = sample(mine[0], offset=64)
    for refused in (sample(others[0]), stranger, second, sample(mine[1], number=7)):
        assert index.deliver(ROLLOUT, [refused]) == [refused.work_id]
    assert index.deliver(ROLLOUT, [accepted, sample(mine[1])]) == [], "the same sample again is no other"
    assert index.deliver(OTHER, [sample(draw) for draw in others]) == []
    assert index.stats()["replay/bytes"] == 40
    score_everything(index)
    assert numbers(index, 0) == [0, 1]


def test_a_sample_without_a_version_is_an_error_of_its_sender():
    index = open_index()
    with pytest.raises(
        ReplayError, match=r"^oldest_version of sample student_text-0-0\.0/0=None must be a policy"
    ):
        index.deliver(ROLLOUT, [sample(admitted(index, 1)[0], None)])


def test_a_payload_is_accepted_once_from_the_teacher_that_has_the_sample():
    index = open_index(teacher_text="none")
    insert(index, admitted(index, 2))
    other = Holder("teacher", 1)
    [first], [second] = index.take(TEACHER, 1), index.take(other, 1)
    assert index.deliver(TEACHER, [scored(second)]) == [second.work_id]
    assert index.deliver(TEACHER, [scored(first)]) == []
    assert index.deliver(TEACHER, [scored(first)]) == [], "sent again, because the answer was lost"
    assert index.deliver(TEACHER, [scored(first, offset=64)]) == [first.work_id]
    assert index.deliver(other, [scored(second)]) == []
    assert index.stats()["replay/student_text.scored"] == 2
    assert index.stats()["replay/bytes"] == 200


def test_a_row_of_teacher_text_is_accepted_once_from_the_teacher_that_has_it():
    index = open_index(student_text="none")
    [row] = index.take(TEACHER, 1)
    other = scored(row, "teacher-1.0-0.arrow")
    assert index.deliver(Holder("teacher", 1), [other]) == [other.work_id]
    assert index.deliver(TEACHER, [scored(row)]) == []
    assert index.deliver(TEACHER, [scored(row)]) == []
    assert index.deliver(TEACHER, [scored(row, offset=64)]) == [scored(row).work_id]
    assert index.stats()["replay/bytes"] == 100


def test_the_work_of_a_dead_teacher_is_given_to_another():
    index = open_index()
    insert(index, admitted(index, 2))
    held = index.take(TEACHER, 64)
    assert not index.take(TEACHER, 64)
    assert index.forget(TEACHER) == len(held)
    assert index.holdings.is_dead(TEACHER)
    late = scored(held[0])
    assert index.deliver(TEACHER, [late]) == [late.work_id]
    again = index.take(Holder("teacher", 0, 1), 64)
    assert again[:2] == held[:2]
    assert [draw.draw_id for draw in again[2:]] == [draw.draw_id for draw in held[2:]]
    assert index.forget(TEACHER) == 0


def test_work_that_an_actor_does_not_know_of_is_told_again():
    index = open_index()
    draws = admitted(index, 3)
    assert index.holdings.missing(ROLLOUT, [draw.work_id for draw in draws]) == []
    assert index.holdings.missing(ROLLOUT, [draws[1].work_id]) == [draws[0], draws[2]]
    insert(index, draws[:1])
    assert index.holdings.missing(ROLLOUT, []) == draws[1:]
    assert index.holdings.missing(OTHER, []) == []


def test_state_contains_acknowledged_updates_and_loads_from_json():
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
    assert admitted(resumed, 8) == [], "the engines do not have the checkpoint's weights yet"
    resumed.advance(1, 7)
    assert [draw.number for draw in admitted(resumed, 8)] == [2, 3, 4, 5]
    assert resumed.take(TEACHER, 64)[0].number == 2


@pytest.mark.parametrize("max_policy_age", [0, 2])
def test_a_new_share_applies_from_the_first_update_without_admitted_draws(max_policy_age):
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
    # advance(4) had admitted the teacher draws of the updates before this one
    grown = 4 + max_policy_age + 2
    assert kinds == [False] * grown + [True] * (12 - grown)
    resumed = Settings(**settings).index()
    resumed.load_state(state)
    resumed.advance(4, 5)
    for update in range(4, 12):
        fill(resumed, update + 1)
        assert bool(numbers(resumed, update)) == kinds[update]
        train(resumed, update)


def test_the_state_of_a_different_plan_is_rejected():
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


def test_a_learner_that_went_back_gets_its_leases_again_and_old_rollouts_are_repeated():
    index = open_index(max_policy_age=1, num_updates=10)
    for update in range(4):
        fill(index, version=update + 1)
        train(index, update)
    in_flight = admitted(index, 8)
    assert [draw.number for draw in in_flight] == [10, 11]
    index.commit(1)
    index.advance(1, 20)  # restarted from the checkpoint of update 1
    insert(index, in_flight, version=20)
    score_everything(index)
    for update, version in ((1, 21), (2, 22), (3, 23), (4, 24)):
        assert numbers(index, update) == [2 * update, 2 * update + 1]
        index.acknowledge(update)
        index.advance(update + 1, version)
    assert index.lease(5) is None, "its rollouts contain tokens of update 1"
    assert [draw.number for draw in admitted(index, 2)] == [10, 11]


def test_in_lock_step_everything_after_the_learners_checkpoint_is_drawn_again():
    index = open_index(max_policy_age=0, num_updates=6)
    fill(index)
    train(index, 0)
    state = json.loads(json.dumps(index.state()))
    index.commit(1)
    fill(index, version=2)
    train(index, 1)
    late = admitted(index)
    assert [draw.number for draw in late] == [4, 5]
    assert index.go_back(state)
    assert admitted(index) == [], "the engines do not have the checkpoint's weights yet"
    index.advance(1, 9)
    again = admitted(index)
    assert [draw.number for draw in again] == [2, 3]
    insert(index, again, version=9)
    score_everything(index)
    assert numbers(index, 1) == [2, 3]
    index.acknowledge(1)
    index.advance(2, 10)
    assert [draw.number for draw in admitted(index)] == [4, 5]
    # What was under way arrives late. It was sampled by weights that are lost.
    assert len(index.deliver(ROLLOUT, [sample(draw, 3) for draw in late])) == len(late)


def test_in_lock_step_a_learner_without_checkpoint_starts_anew():
    index = open_index(max_policy_age=0, num_updates=6)
    fill(index)
    train(index, 0)
    assert index.go_back(None)
    index.advance(0, 9)
    assert [draw.number for draw in admitted(index)] == [0, 1]


def test_otherwise_the_rows_stay_and_the_learner_gets_its_leases_again():
    index = open_index(max_policy_age=2, num_updates=9)
    fill(index)
    train(index, 0)
    state = json.loads(json.dumps(index.state()))
    fill(index, version=2)
    train(index, 1)
    leases = [index.lease(1), index.lease(2)]
    assert not index.go_back(state)  # the checkpoint is durable, although no call has committed it
    assert index.updates_committed == 1
    index.advance(1, 9)
    assert [index.lease(1), index.lease(2)] == leases
