"""The long polls around the index."""

from __future__ import annotations

import asyncio

import pytest

from distill.interfaces import Replay
from distill.replay.ledger import ReplayError
from distill.replay.service import ReplayService
from tests.unit.replay.builders import Settings, fill, group, teacher_group


def make(**settings: object) -> ReplayService:
    return ReplayService(Settings(**settings).index())


async def still_waits(task: asyncio.Task) -> bool:
    await asyncio.sleep(0.01)
    return not task.done()


async def test_calls_wait_for_their_result_and_no_longer():
    replay: Replay = make(num_updates=1, teacher_rows_per_update=1)
    admitted = asyncio.create_task(replay.admit(8))
    leased = asyncio.create_task(replay.lease(0))
    assert await still_waits(admitted)
    await replay.advance(0, 1)
    draws = await admitted
    assert [draw.number for draw in draws] == [0, 1]

    job = await replay.take_for_scoring(64)
    assert job.teacher_draws
    waiting = asyncio.create_task(replay.take_for_scoring(64))
    assert await still_waits(waiting)
    await replay.insert([group(draw) for draw in draws])
    assert [ref.draw for ref in (await waiting).groups] == draws

    await replay.insert_scored([teacher_group(draw) for draw in job.teacher_draws])
    assert await still_waits(leased)
    await replay.insert_scored([group(draw, segment="teacher-0.arrow") for draw in draws])
    lease = await leased
    assert lease is not None
    assert len(lease.groups) == 3


async def test_every_wait_ends_empty_when_the_run_is_over():
    replay = make(num_updates=1)
    await replay.advance(0, 1)
    fill(replay.index)
    assert await replay.lease(0) is not None
    waits = [asyncio.create_task(replay.admit(8)), asyncio.create_task(replay.take_for_scoring(8))]
    await replay.acknowledge(0)
    assert await still_waits(waits[0])
    await replay.advance(1, 2)
    draws, job = await asyncio.gather(*waits)
    assert draws == []
    assert not job
    assert await replay.lease(1) is None


async def test_stop_ends_waits_now_and_later():
    replay = make()
    waits = [asyncio.create_task(call) for call in (replay.admit(1), replay.lease(0))]
    assert await still_waits(waits[0])
    await replay.stop()
    assert await asyncio.gather(*waits) == [[], None]
    assert not await replay.take_for_scoring(8), "teacher draws are due, but the run was stopped"


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
    other = asyncio.create_task(replay.admit(1))
    with pytest.raises(ReplayError):
        await replay.acknowledge(0)
    with pytest.raises(
        ReplayError, match=r"^update=2 must be in \[0, 0\].*; resume from the newest checkpoint$"
    ):
        await replay.lease(2)
    assert await still_waits(other)
    await replay.advance(0, 1)
    assert await other


async def test_a_cancelled_wait_does_not_disturb_the_others():
    replay = make()
    first, second = asyncio.create_task(replay.admit(1)), asyncio.create_task(replay.admit(1))
    await asyncio.sleep(0)
    first.cancel()
    await replay.advance(0, 1)
    assert [draw.number for draw in await second] == [0]


async def test_seconds_waited_count_by_caller_while_the_wait_lasts():
    replay = make(student_text="every_update", teacher_text="none")
    waits = [asyncio.create_task(replay.admit(1)), asyncio.create_task(replay.lease(0))]
    await asyncio.sleep(0.03)
    stats = await replay.stats()
    assert stats["timing/rollout_blocked_s"] >= 0.02
    assert stats["timing/learner_starved_s"] >= 0.02
    assert stats["timing/teacher_starved_s"] == 0
    await replay.stop()
    await asyncio.gather(*waits)
    assert (await replay.stats())["timing/rollout_blocked_s"] >= stats["timing/rollout_blocked_s"]


async def test_requeue_wakes_an_actor_and_a_checkpoint_is_restored():
    replay = make(max_policy_age=0, teacher_text="none")
    await replay.advance(0, 1)
    draws = await replay.admit(1)
    waiting = asyncio.create_task(replay.admit(1))
    assert await still_waits(waiting)
    assert await replay.requeue([draw.draw_id for draw in draws], "rollout") == 2
    assert await waiting == draws

    resumed = make(max_policy_age=0, teacher_text="none")
    await resumed.load_state(await replay.state())
    await resumed.advance(0, 2)
    assert await resumed.admit(1) == draws
    await resumed.commit(0)
    assert await resumed.freed_segments("rollout-0") == {}
