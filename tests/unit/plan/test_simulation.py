"""Simulated runs take what closed forms say."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from deploy.plan.engines import WaitingEngine
from deploy.plan.load import Load, Service, waiting_config
from deploy.plan.simulate import simulate
from deploy.plan.virtual_time import Deadlock, run_in_virtual_time

LOAD = Load(
    config=waiting_config(
        num_rollouts=4, num_teachers=2, prompts_per_update=16, num_updates=16, max_policy_age=3
    ),
    rollout=Service(1.0),
    teacher=Service(0.25),
    update=Service(1 / 16),
    push_s=0.1,
)


def test_time_jumps_to_the_next_timer():
    async def work() -> list[float]:
        now = asyncio.get_running_loop().time
        await asyncio.gather(asyncio.sleep(3600), asyncio.sleep(1800))
        return [now()]

    before = time.monotonic()
    assert run_in_virtual_time(work()) == [pytest.approx(3600)]
    assert time.monotonic() - before < 60


def test_tasks_that_wait_for_each_other_are_an_error():
    with pytest.raises(Deadlock):
        run_in_virtual_time(asyncio.Event().wait())


def test_in_lock_step_an_update_takes_the_sum_of_its_parts():
    outcome = simulate(LOAD.changed({"replay.max_policy_age": 0}))
    # Each rollout engine has 4 texts and each teacher 8.
    assert 1 / outcome.updates_per_s == pytest.approx(4 * 1.0 + 8 * 0.25 + 1.0 + 0.1)
    assert outcome.samples_per_s == pytest.approx(16 * outcome.updates_per_s)
    shares = {name: share for name, share in outcome.row.items() if name.endswith("share")}
    assert shares == pytest.approx(
        {"rollout/busy_share": 4 / 7.1, "teacher/busy_share": 2 / 7.1, "learner/busy_share": 1 / 7.1}
    )


def test_samples_and_teacher_text_count_as_the_recipe_has_them():
    changes = {
        "replay.max_policy_age": 0,
        "rollout.samples_per_prompt": 3,
        "recipe.teacher_text": "reference",
        "learner.teacher_rows_per_update": 8,
    }
    outcome = simulate(LOAD.changed(changes))
    # 48 samples in four engines; 48 samples and 8 rows of teacher text in two; one update of 56 rows.
    assert 1 / outcome.updates_per_s == pytest.approx(12 * 1.0 + 28 * 0.25 + 56 / 16 + 0.1, rel=0.05)
    assert outcome.samples_per_s == pytest.approx(48 * outcome.updates_per_s)


@pytest.mark.parametrize("slowest", ["rollout", "teacher", "learner"])
def test_stages_that_overlap_are_as_fast_as_the_slowest(slowest: str):
    services = {"rollout": "rollout", "teacher": "teacher", "learner": "update"}
    fast = {"rollout": Service(0.05), "teacher": Service(0.02), "update": Service(0.2 / 16)}
    slow = {"rollout": Service(1.0), "teacher": Service(0.5), "update": Service(4.0 / 16)}
    name = services[slowest]
    load = replace(LOAD, **{**fast, name: slow[name]}, push_s=0.01)
    assert min(load.rates, key=lambda stage: load.rates[stage]) == slowest
    assert simulate(load).updates_per_s == pytest.approx(min(load.rates.values()), rel=0.02)


def test_a_simulation_has_the_same_result_every_time():
    assert simulate(LOAD) == simulate(LOAD)


async def finished_at(service: Service, starts: list[float]) -> list[float]:
    engine, now = WaitingEngine(service), asyncio.get_running_loop().time

    async def one(start: float) -> float:
        await asyncio.sleep(start)
        await engine.serve()
        return now()

    return await asyncio.gather(*map(one, starts))


@pytest.mark.parametrize(
    ("service", "starts", "ends"),
    [
        (Service(2.0), [0.0], [2.0]),
        (Service(1.0), [0.0, 0.0, 0.0], [3.0, 3.0, 3.0]),
        # One half is done alone in 0.5 s, then two share: half of it takes 1 s; then 0.5 of the second alone.
        (Service(1.0), [0.0, 0.5], [1.5, 2.0]),
        (Service(0.0, fixed_s=2.0), [0.0, 1.0, 1.0], [2.0, 3.0, 3.0]),
        (Service(1.0, fixed_s=1.0), [0.0, 0.0, 5.0], [3.0, 3.0, 7.0]),
    ],
    ids=str,
)
def test_texts_in_one_engine_share_it(service: Service, starts: list[float], ends: list[float]):
    assert run_in_virtual_time(finished_at(service, starts)) == pytest.approx(ends)


def test_a_decoding_engine_gains_from_several_texts_at_a_time():
    load = replace(
        LOAD.changed({"rollout.replicas": 1}),
        rollout=Service(0.1, fixed_s=1.0),
        teacher=Service(0.0),
        update=Service(0.0),
        push_s=0.0,
    )
    one, many = (simulate(load.changed({"rollout.max_num_seqs": number})) for number in (1, 8))
    assert one.samples_per_s == pytest.approx(1 / 1.1, rel=0.02)
    assert many.samples_per_s == pytest.approx(8 / 1.8, rel=0.05)
