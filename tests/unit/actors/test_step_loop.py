"""The step loop over an engine without a model: what shares a step, what fails alone, what ends it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import numpy as np
import pytest

from actors.step_loop import AFTER_DEATH, StepLoop
from actors.stepped_teacher import text_tokens
from distill.interfaces import EngineDied, Tokens

WAIT_S = 20


class Engine:
    """Computes a text in as many steps as its prompt has tokens. A step waits until the test permits it."""

    def __init__(self) -> None:
        self.unfinished: dict[str, list[int]] = {}
        self.steps_left: dict[str, int] = {}
        self.steps: list[list[list[int]]] = []
        """The prompts of each step."""
        self.permits = threading.Semaphore(0)
        self.in_step = threading.Event()
        self.step_error: Exception | None = None
        self.aborted: list[list[int]] = []
        self.closed = threading.Event()
        self.threads: set[int] = set()

    def add(self, request_id: str, prompt: Tokens, response: Tokens) -> None:
        self.threads.add(threading.get_ident())
        if prompt[0] < 0:
            raise ValueError("a token is negative")
        self.unfinished[request_id] = list(prompt)
        self.steps_left[request_id] = len(prompt)

    def step(self) -> Iterable[tuple[str, Any]]:
        self.in_step.set()
        self.permits.acquire(timeout=WAIT_S)
        if self.step_error is not None:
            raise self.step_error
        self.steps.append(list(self.unfinished.values()))
        finished = []
        for request_id, prompt in list(self.unfinished.items()):
            self.steps_left[request_id] -= 1
            if self.steps_left[request_id] == 0:
                del self.unfinished[request_id]
                finished.append((request_id, KeyError(prompt[0]) if prompt[-1] == 999 else prompt))
        return finished

    def abort(self, request_ids: list[str]) -> None:
        found = (self.unfinished.pop(request_id, None) for request_id in request_ids)
        self.aborted += [prompt for prompt in found if prompt is not None]

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
async def loop(engine: Engine) -> AsyncIterator[StepLoop]:
    loop = StepLoop("teacher engine")
    await loop.start(lambda: engine)
    yield loop
    engine.permits.release(1000)
    await loop.close()
    assert engine.closed.is_set()


def score(
    loop: StepLoop, *prompts: list[int], convert: Callable[[Any], Any] = sum
) -> asyncio.Task[list[Any]]:
    return asyncio.create_task(loop.call(prompts, [[0]] * len(prompts), convert))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_single_call_is_in_the_engine_before_the_first_step(loop: StepLoop, engine: Engine) -> None:
    """Lock-step runs need it: otherwise the composition of a batch, and its last bits, depend on timing."""
    prompts = [[number] for number in range(200)]
    engine.permits.release()
    assert await score(loop, *prompts) == list(range(200))
    assert engine.steps == [prompts]


async def test_a_later_call_joins_the_steps_of_an_earlier_one(loop: StepLoop, engine: Engine) -> None:
    first = score(loop, [1] * 3)
    await until(engine.in_step.is_set)
    second = score(loop, [2])
    await asyncio.sleep(0.01)
    engine.permits.release(2)
    assert await second == [2]
    assert not first.done()
    engine.permits.release()
    assert await first == [3]
    assert engine.steps == [[[1] * 3], [[1] * 3, [2]], [[1] * 3]]
    assert len(engine.threads) == 1 and threading.get_ident() not in engine.threads


async def test_in_lock_step_calls_do_not_share_a_step(engine: Engine) -> None:
    """Otherwise an evaluation that scores while the replay does would change the last bits of both."""
    loop = StepLoop("teacher engine", lock_step=True)
    await loop.start(lambda: engine)
    first, second = score(loop, [1] * 2, [1]), score(loop, [2], [3])
    cancelled = score(loop, [4])
    await until(engine.in_step.is_set)
    cancelled.cancel()
    await asyncio.sleep(0.01)
    engine.permits.release(1000)
    assert (await first, await second, await score(loop, [5])) == ([2, 1], [2, 3], [5])
    assert engine.steps == [[[1] * 2, [1]], [[1] * 2], [[2], [3]], [[5]]]
    last = score(loop, [6] * 2000)
    await loop.close()
    assert engine.closed.is_set() and len(engine.steps) < 2000
    with pytest.raises(RuntimeError, match="was closed"):
        await last


async def test_results_come_in_the_order_of_the_texts(loop: StepLoop, engine: Engine) -> None:
    engine.permits.release(10)
    assert await score(loop, [5] * 3, [7], [9] * 2) == [15, 7, 18]
    assert await score(loop) == []


async def test_a_refused_text_fails_its_call_only(loop: StepLoop, engine: Engine) -> None:
    good = score(loop, [1] * 2)
    await until(engine.in_step.is_set)
    bad = score(loop, [2], [-1], [3])
    engine.permits.release(2)
    with pytest.raises(ValueError, match="a token is negative"):
        await bad
    assert await good == [2]
    assert engine.aborted == [[2]]


@pytest.mark.parametrize(("prompt", "convert"), [([4, 999], sum), ([4, 4], "text".index)])
async def test_a_text_without_states_fails_its_call_only(
    loop: StepLoop, engine: Engine, prompt: list[int], convert: Callable[[Any], Any]
) -> None:
    """Also if the states cannot be converted. Texts of the call that finish in the same step change nothing."""
    bad = score(loop, prompt, [8] * 5, prompt, convert=convert)
    good = score(loop, [1] * 3)
    engine.permits.release(3)
    with pytest.raises((KeyError, TypeError)):
        await bad
    assert await good == [3]
    assert [8] * 5 in engine.aborted and engine.unfinished == {}


async def test_a_cancelled_call_leaves_the_engine(loop: StepLoop, engine: Engine) -> None:
    cancelled, kept = score(loop, [1] * 9, [2] * 9), score(loop, [3] * 2)
    await until(engine.in_step.is_set)
    waiting = score(loop, [4] * 9)
    await asyncio.sleep(0.01)
    cancelled.cancel()
    waiting.cancel()
    await asyncio.sleep(0.01)
    engine.permits.release(2)
    assert await kept == [6]
    assert sorted(engine.aborted) == [[1] * 9, [2] * 9]
    assert engine.steps[1] == [[3] * 2]


async def test_the_death_of_the_engine_fails_every_call(engine: Engine) -> None:
    loop = StepLoop("teacher engine")
    await loop.start(lambda: engine)
    calls = [score(loop, [1]), score(loop, [2])]
    await until(engine.in_step.is_set)
    calls.append(score(loop, [3]))
    await asyncio.sleep(0.01)
    engine.step_error = RuntimeError("Executor failed.\nA traceback")
    engine.permits.release()
    message = rf"^teacher engine must live; a step of it failed \(Executor failed\); {AFTER_DEATH[:20]}"
    for call in calls:
        with pytest.raises(EngineDied, match=message):
            await call
    with pytest.raises(EngineDied, match=message):
        await score(loop, [4])
    await until(engine.closed.is_set)
    await loop.close()


async def test_a_failure_from_outside_does_not_wait_for_a_step_that_hangs(loop: StepLoop) -> None:
    call = score(loop, [1])
    await asyncio.sleep(0.01)
    loop.fail(EngineDied("teacher engine", 3, "live"))
    with pytest.raises(EngineDied, match=r"^teacher engine=3 must live$"):
        await call


async def test_closing_fails_the_calls_and_ends_the_thread_after_its_step(engine: Engine) -> None:
    loop = StepLoop("teacher engine")
    await loop.start(lambda: engine)
    call = score(loop, [1] * 500)
    await until(engine.in_step.is_set)
    closing = asyncio.create_task(loop.close())
    with pytest.raises(RuntimeError, match=r"^the teacher engine was closed$"):
        await call
    engine.permits.release()
    await closing
    assert engine.closed.is_set() and len(engine.steps) == 1
    with pytest.raises(RuntimeError, match=r"^the teacher engine was closed$"):
        await score(loop, [1])
    await loop.close()


async def test_a_start_that_fails_raises_its_error() -> None:
    def fail() -> Engine:
        raise ValueError("no such model")

    loop = StepLoop("teacher engine")
    with pytest.raises(ValueError, match="no such model"):
        await loop.start(fail)


@pytest.mark.parametrize("kind", [list, np.array, lambda tokens: np.array(tokens, np.int32)])
def test_a_teacher_reads_all_but_the_last_response_token(kind: Callable[[list[int]], Tokens]) -> None:
    tokens = text_tokens(kind([1, 2]), kind([3, 4, 5]))
    assert tokens.dtype == np.int64 and tokens.tolist() == [1, 2, 3, 4]
    assert text_tokens(kind([1, 2]), kind([3])).tolist() == [1, 2]
