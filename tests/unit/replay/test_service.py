"""The long polls around the index. Their races: test_races."""

from __future__ import annotations

import asyncio

import pytest

from distill.interfaces import Exchange, Holder, Replay, ReplayUnavailable
from distill.replay.ledger import ReplayError
from distill.replay.past import IndexPast
from distill.replay.service import ReplayService
from tests.unit.replay.builders import ROLLOUT, TEACHER, Settings, fill, sample, scored

OTHER = Holder("rollout", 1)


def make(**settings: object) -> ReplayService:
    return ReplayService(Settings(**settings).index())


def asking(replay: ReplayService, holder: Holder, room: int = 8) -> asyncio.Task[Exchange]:
    return asyncio.create_task(replay.exchange(holder, [], [], room))


async def still_waits(task: asyncio.Task) -> bool:
    await asyncio.sleep(0.01)
    return not task.done()


async def test_calls_wait_for_their_result_and_no_longer():
    replay: Replay = make(num_updates=1, teacher_rows_per_update=1)
    admitted = asking(replay, ROLLOUT)
    leased = asyncio.create_task(replay.lease(0))
    assert await still_waits(admitted)
    await replay.advance(0, 1)
    draws = (await admitted).work
    assert [draw.number for draw in draws] == [0, 1]

    rows = (await replay.exchange(TEACHER, [], [], 64)).work
    assert len(rows) == 1
    holding = [rows[0].work_id]
    waiting = asyncio.create_task(replay.exchange(TEACHER, [], holding, 64))
    assert await still_waits(waiting)
    delivered = asyncio.create_task(replay.exchange(ROLLOUT, [sample(draw) for draw in draws], [], 8))
    samples = (await waiting).work
    assert [each.draw for each in samples] == list(draws)

    done = [scored(each) for each in rows]
    last = asyncio.create_task(replay.exchange(TEACHER, done, [each.work_id for each in samples], 8))
    assert await still_waits(leased)
    await asyncio.gather(asking(replay, TEACHER, 0), last)
    assert (await replay.exchange(TEACHER, [scored(each) for each in samples], [], 0)) == Exchange()
    lease = await leased
    assert lease is not None
    assert len(lease.groups) == 3
    assert await still_waits(delivered), "the rollout actor's delivery asked for more work"
    delivered.cancel()


async def test_every_wait_ends_when_the_run_is_over():
    replay = make(num_updates=1)
    await replay.advance(0, 1)
    fill(replay.index)
    assert await replay.lease(0) is not None
    waits = [asking(replay, ROLLOUT), asking(replay, TEACHER)]
    await replay.acknowledge(0)
    assert await still_waits(waits[0])
    await replay.advance(1, 2)
    assert await asyncio.gather(*waits) == [Exchange(over=True)] * 2
    assert await asking(replay, OTHER) == Exchange(over=True)
    assert await replay.lease(1) is None


async def test_stop_ends_waits_now_and_later():
    replay = make()
    waits = [asking(replay, ROLLOUT), asyncio.create_task(replay.lease(0))]
    assert await still_waits(waits[0])
    await replay.stop()
    assert await asyncio.gather(*waits) == [Exchange(over=True), None]
    assert await asking(replay, TEACHER) == Exchange(over=True), (
        "teacher draws are due, but the run was stopped"
    )


async def test_a_learner_that_went_back_gets_its_lease_after_the_last_update():
    replay = make(num_updates=1)
    await replay.advance(0, 1)
    fill(replay.index)
    lease = await replay.lease(0)
    await replay.acknowledge(0)
    await replay.advance(1, 2)
    assert await replay.lease(0) == lease


async def test_an_error_reaches_only_its_caller():
    replay = make()
    other = asking(replay, ROLLOUT)
    with pytest.raises(ReplayError):
        await replay.acknowledge(0)
    with pytest.raises(
        ReplayError, match=r"^update=2 must be in \[0, 0\].*; resume from the newest checkpoint$"
    ):
        await replay.lease(2)
    assert await still_waits(other)
    await replay.advance(0, 1)
    assert (await other).work


async def test_a_cancelled_wait_takes_nothing_from_the_others():
    replay = make()
    first, second = asking(replay, ROLLOUT, 1), asking(replay, OTHER, 1)
    await asyncio.sleep(0)
    first.cancel()
    await replay.advance(0, 1)
    assert [draw.number for draw in (await second).work] == [0]


async def test_a_dead_callers_wait_takes_nothing_from_the_others():
    """The caller's process is gone, but nothing told the service: its wait goes on until it is forgotten."""
    replay = make(max_policy_age=0, prompts_per_update=1)
    dead = asking(replay, ROLLOUT)
    await asyncio.sleep(0)
    assert await replay.forget(ROLLOUT) == 0
    assert await dead == Exchange(over=True)
    heir = asking(replay, Holder("rollout", 0, 1))
    await replay.advance(0, 1)
    assert len((await heir).work) == 1
    late = [sample(draw) for draw in (await heir).work]
    assert await replay.exchange(ROLLOUT, late, [], 1) == Exchange(refused=(late[0].work_id,), over=True)


async def test_work_given_to_a_dead_caller_goes_to_another():
    replay = make(max_policy_age=0, prompts_per_update=2)
    given = asking(replay, ROLLOUT)
    await replay.advance(0, 1)
    assert len((await given).work) == 2
    heir = asking(replay, Holder("rollout", 0, 1))
    assert await still_waits(heir)
    assert await replay.forget(ROLLOUT) == 2
    assert [draw.draw_id for draw in (await heir).work] == [draw.draw_id for draw in (await given).work]


async def test_an_answer_that_was_lost_is_given_again():
    replay = make()
    await replay.advance(0, 1)
    lost = await replay.exchange(ROLLOUT, [], [], 2)
    again = await replay.exchange(ROLLOUT, [], [], 2)
    assert again == lost
    more = await replay.exchange(ROLLOUT, [], [lost.work[1].work_id], 3)
    assert more.work == (lost.work[0], *more.work[1:]), "what is lost counts as room that is taken"
    assert len(more.work) == 3
    waits = asyncio.create_task(
        replay.exchange(ROLLOUT, [], [draw.work_id for draw in (*lost.work, *more.work)], 1)
    )
    assert await still_waits(waits)
    waits.cancel()


async def test_a_newer_call_ends_the_wait_of_an_older_one():
    replay = make(num_updates=1)
    await replay.advance(0, 1)
    draws = (await replay.exchange(ROLLOUT, [], [], 2)).work
    older = asyncio.create_task(replay.exchange(ROLLOUT, [], [draw.work_id for draw in draws], 6))
    assert await still_waits(older)
    newer = asyncio.create_task(replay.exchange(ROLLOUT, [sample(draws[0])], [draws[1].work_id], 7))
    assert await older == Exchange()
    assert await still_waits(newer)
    newer.cancel()


async def test_work_goes_to_the_actor_that_has_the_most_room():
    replay = make(prompts_per_update=5)
    loaded, idle = asking(replay, ROLLOUT, 3), asking(replay, OTHER, 7)
    await asyncio.sleep(0)
    await replay.advance(0, 1)
    assert (len((await loaded).work), len((await idle).work)) == (3, 7)
    replay = make(prompts_per_update=3)
    loaded, idle = asking(replay, ROLLOUT, 3), asking(replay, OTHER, 7)
    await asyncio.sleep(0)
    await replay.advance(0, 1)
    assert (len((await loaded).work), len((await idle).work)) == (1, 5)


async def test_a_lease_that_gives_stale_groups_back_wakes_those_who_can_roll_them_out():
    """The learner went back to update 0 while draws 6 and 7 were in flight under older weights."""
    replay = make(max_policy_age=1, num_updates=4, teacher_text="none")
    await replay.advance(0, 1)
    fill(replay.index)
    version = 1
    for update in range(2):
        await replay.lease(update)
        await replay.acknowledge(update)
        version += 1
        await replay.advance(update + 1, version)
        if update == 0:
            fill(replay.index, version)
    in_flight = (await replay.exchange(ROLLOUT, [], [], 8)).work
    assert [draw.number for draw in in_flight] == [6, 7]
    version += 1
    await replay.advance(0, version)
    done = [sample(draw, version) for draw in in_flight]
    waiting = asyncio.create_task(replay.exchange(ROLLOUT, done, [], 8))
    await asyncio.sleep(0)
    for update in range(3):
        while work := replay.index.take(TEACHER, 8):
            await replay.exchange(TEACHER, [scored(each) for each in work], [], 0)
        assert await replay.lease(update) is not None
        await replay.acknowledge(update)
        version += 1
        await replay.advance(update + 1, version)
    assert await still_waits(waiting)
    lease = asyncio.create_task(replay.lease(3))
    again = (await asyncio.wait_for(waiting, 1)).work
    assert [(draw.number, draw.issue) for draw in again] == [(6, 1), (7, 1)]
    await replay.exchange(ROLLOUT, [sample(draw, version) for draw in again], [], 0)
    work = (await replay.exchange(TEACHER, [], [], 8)).work
    await replay.exchange(TEACHER, [scored(each) for each in work], [], 0)
    assert await asyncio.wait_for(lease, 1) is not None


async def test_seconds_that_the_learner_waits_count_while_the_wait_lasts():
    replay = make(teacher_text="none")
    wait = asyncio.create_task(replay.lease(0))
    await asyncio.sleep(0.03)
    during = (await replay.stats())["timing/learner_starved_s"]
    assert during >= 0.02
    await replay.stop()
    await wait
    after = (await replay.stats())["timing/learner_starved_s"]
    await asyncio.sleep(0.01)
    assert during <= after == (await replay.stats())["timing/learner_starved_s"]


async def test_an_actor_that_has_work_and_delivers_nothing_is_found():
    replay = make(prompts_per_update=1, max_policy_age=1, teacher_text="none")
    await replay.advance(0, 1)
    idle = asking(replay, TEACHER)
    draws = (await asking(replay, ROLLOUT)).work
    await asyncio.sleep(0.03)
    assert list(await replay.stalled(0.02)) == [ROLLOUT]
    assert await replay.stalled(5) == {}
    await replay.exchange(ROLLOUT, [sample(draws[0])], [draws[1].work_id], 0)
    assert await replay.stalled(0.02) == {}
    await idle
    await asyncio.sleep(0.03)
    assert list(await replay.stalled(0.02)) == [ROLLOUT, TEACHER]
    await replay.forget(ROLLOUT)
    assert list(await replay.stalled(0.02)) == [TEACHER]


async def test_a_checkpoint_is_restored():
    replay = make(max_policy_age=0, teacher_text="none")
    await replay.advance(0, 1)
    draws = (await replay.exchange(ROLLOUT, [], [], 1)).work
    resumed = make(max_policy_age=0, teacher_text="none")
    await resumed.take_over(IndexPast(state=await replay.state()))
    await resumed.advance(0, 2)
    assert (await resumed.exchange(ROLLOUT, [], [], 1)).work == draws
    await resumed.commit(0)
    assert await resumed.live_segments(["rollout-0.0-0.arrow"]) == []


async def test_a_successor_answers_nobody_until_it_knows_what_the_run_has_done():
    replay = ReplayService(Settings().index(), is_open=False)
    with pytest.raises(
        ReplayUnavailable, match=r"^replay must know what the run has done so far; call again$"
    ):
        await replay.exchange(ROLLOUT, [], [], 8)
    with pytest.raises(ReplayUnavailable):
        await replay.live_segments(["rollout-0.0-0.arrow"])
    await replay.take_over(IndexPast(state=None))
    await replay.advance(0, 1)
    assert (await replay.exchange(ROLLOUT, [], [], 8)).work
