"""The index between its tables: leases, versions, rejected calls, checkpoints. Interleavings: test_index_model."""

from __future__ import annotations

import json

import pytest

from distill.interfaces import Draw
from distill.replay.ledger import ReplayError, TrainedDraws, VersionHistory
from tests.unit.replay.builders import (
    Settings,
    fill,
    group,
    numbers,
    open_index,
    score_everything,
    teacher_group,
    train,
)

LATE = "its group arrived twice, or late from an actor that lost the draw; drop the group$"


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


def test_unexpected_groups_are_rejected():
    index = open_index()
    draws = index.admit(2)
    index.insert([group(draws[0])])
    with pytest.raises(ReplayError, match=rf"^draw student_text-0-0=generated must be dispatched; {LATE}"):
        index.insert([group(draws[1]), group(draws[0])])
    stranger = Draw(table="student_text", number=99, epoch=0, index=0)
    with pytest.raises(ReplayError, match=rf"^draw student_text-0-99=unknown.* must be dispatched; {LATE}"):
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


def test_a_rejected_scoring_changes_nothing():
    index = open_index()
    index.insert([group(index.admit(1)[0])])
    job = index.take_for_scoring(8)
    late = Draw(table="teacher_text", number=77, epoch=0, index=0)
    with pytest.raises(
        ReplayError,
        match=r"^draw teacher_text-0-77=unknown or trained must be dispatched; its row arrived twice, .*; drop the row$",
    ):
        index.insert_scored([group(job.groups[0].draw), teacher_group(late)])
    assert index.stats()["replay/student_text.scored"] == 0
    index.insert_scored([group(job.groups[0].draw)])


def test_the_job_of_a_dead_teacher_is_issued_again():
    index = open_index()
    index.insert([group(draw) for draw in index.admit(2)])
    job = index.take_for_scoring(64)
    held = [ref.draw.draw_id for ref in job.groups] + [draw.draw_id for draw in job.teacher_draws]
    assert not index.take_for_scoring(64)
    assert index.requeue(held, "rollout") == 0, "no rollout actor has the draws that are being scored"
    assert index.requeue(held, "scoring") == len(held)
    with pytest.raises(
        ReplayError,
        match=r"^draw student_text-0-0 must be with a teacher actor; its job was given back; drop the group$",
    ):
        index.insert_scored([group(job.groups[0].draw)])
    assert index.take_for_scoring(64) == job


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
    assert resumed.admit(8) == [], "the engines do not have the checkpoint's weights yet"
    resumed.advance(1, 7)
    assert [draw.number for draw in resumed.admit(8)] == [2, 3, 4, 5]
    assert resumed.take_for_scoring(64).teacher_draws[0].number == 2


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
    assert index.lease(5) is None, "its rollouts contain tokens of update 1"
    assert [draw.number for draw in index.admit(2)] == [10, 11]
