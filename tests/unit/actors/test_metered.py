"""Counting what an engine does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from actors.metered import MeteredGenerator, MeteredTeacher
from distill.interfaces import Completion, SampleRequest
from distill.machine import clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    time = [100.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: time[0])
    return time


class HeldEngine:
    """A generator and teacher whose calls end when the test releases them."""

    def __init__(self) -> None:
        self.released: list[asyncio.Event] = []
        self.num_finished = 0

    async def _wait(self) -> None:
        self.released.append(asyncio.Event())
        await self.released[-1].wait()

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        await self._wait()
        return [
            Completion(response_tokens=[1, 2], logprobs=[0.0, 0.0], policy_versions=[], finish_reason="stop")
            for _ in requests
        ]

    async def hidden_states(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        await self._wait()
        return [np.zeros((len(response), 2), np.uint16) for response in responses]


def calls(kind: str) -> tuple[HeldEngine, Any, Any]:
    """The held engine, its metered wrapper, and a function that starts a call."""
    inner: Any = HeldEngine()
    if kind == "generator":
        generator = MeteredGenerator(inner)
        request = SampleRequest(prompt_tokens=[1], max_new_tokens=2, seed=0)
        return inner, generator, lambda: generator.generate([request] * 3)
    teacher = MeteredTeacher(inner)
    return inner, teacher, lambda: teacher.hidden_states([[1, 2, 3]], [[4, 5, 6]])


@pytest.mark.parametrize("kind", ["generator", "teacher"])
async def test_overlapping_calls_are_counted_once(kind: str, now: list[float]) -> None:
    inner, engine, call = calls(kind)
    first, second = asyncio.create_task(call()), asyncio.create_task(call())
    await asyncio.sleep(0)
    now[0] += 2
    assert engine.clock.busy_s == 2  # while both run
    inner.released[0].set()
    await first
    now[0] += 3
    inner.released[1].set()
    await second
    now[0] += 10  # idle
    assert engine.clock.busy_s == 5
    assert engine.num_tokens == 12
    if kind == "generator":
        assert engine.num_samples == 6


async def test_a_failed_call_ends_its_busy_time(now: list[float]) -> None:
    _, engine, call = calls("teacher")
    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    now[0] += 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    now[0] += 10
    assert engine.clock.busy_s == 1
    assert engine.num_tokens == 0


async def test_busy_storing_and_waiting_add_up_to_all_the_time(now: list[float]) -> None:
    inner, engine, call = calls("generator")
    actor, start = engine.clock, now[0]

    async def run_call(seconds: float) -> None:
        task = asyncio.create_task(call())
        await asyncio.sleep(0)
        now[0] += seconds
        inner.released[-1].set()
        await task

    actor.hold(False)
    now[0] += 1  # waits
    await run_call(2)  # an evaluation's samples: the engine is busy, although there is no work of the replay
    now[0] += 4  # waits again
    actor.hold(True)
    await run_call(8)
    now[0] += 16  # writes its rows
    actor.hold(False)
    now[0] += 32
    assert (actor.busy_s, actor.storing_s, actor.waiting_s) == (10, 16, 37)
    assert actor.busy_s + actor.storing_s + actor.waiting_s == now[0] - start
    actor.stop()
    now[0] += 64
    assert actor.waiting_s == 37


@pytest.mark.parametrize("kind", ["generator", "teacher"])
async def test_an_engine_is_silent_since_a_call_began_or_ended_while_others_run(
    kind: str, now: list[float]
) -> None:
    inner, metered, start = calls(kind)
    now[0] += 50.0
    assert metered.silent_s == 0.0
    first = asyncio.create_task(start())
    await asyncio.sleep(0)
    now[0] += 7.0
    second = asyncio.create_task(start())
    await asyncio.sleep(0)
    now[0] += 1.0
    assert metered.silent_s == 8.0
    inner.released[0].set()
    await first
    assert metered.silent_s == 0.0
    now[0] += 3.0
    assert metered.silent_s == 3.0
    inner.num_finished += 1  # a part of the second call
    assert metered.silent_s == 0.0
    now[0] += 2.0
    assert metered.silent_s == 2.0
    inner.released[1].set()
    await second
    now[0] += 50.0
    assert metered.silent_s == 0.0
