"""Every teacher returns the states that transformers computes, exact and as bfloat16 bits."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from distill.errors import ConfigError
from distill.interfaces import EngineDied
from tests.integration.engines import (
    MAX_MODEL_TOKENS,
    TEACHERS,
    TOLERANCE,
    VOCABULARY,
    EngineHost,
    Student,
    make_prompts,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _pairs() -> tuple[list[list[int]], list[list[int]]]:
    prompts = make_prompts(14)
    lengths = itertools.cycle((1, 20, 3, 64, 100))
    source = random.Random(5)
    responses = [[source.randrange(VOCABULARY) for _ in range(next(lengths))] for _ in prompts]
    return prompts, responses


def test_what_has_been_scored_is_counted_while_a_call_runs(teacher: EngineHost) -> None:
    before = teacher.call("num_finished")
    prompts, responses = _pairs()
    running = teacher.submit("hidden_states", prompts * 20, responses * 20)
    seen = {0}
    while not running.done():
        seen.add(teacher.call("num_finished") - before)
    running.result()
    assert teacher.call("num_finished") - before == 20 * len(prompts)
    assert seen - {0, 20 * len(prompts)}


def test_states_precede_each_response_token(teacher: EngineHost, student: Student) -> None:
    """Multiplied by the head, they give transformers' full-vocabulary log-probabilities."""
    prompts, responses = _pairs()
    states = teacher.call("hidden_states_float32", prompts, responses)
    head = student.models[0].lm_head
    for prompt, response, state in zip(prompts, responses, states, strict=True):
        assert state.shape == (len(response), 64)
        got = head(torch.from_numpy(state)).log_softmax(-1)
        torch.testing.assert_close(got, student.logprobs(0, prompt, response), rtol=0, atol=TOLERANCE)


def test_the_payload_contains_the_states_rounded_to_bfloat16(
    teacher: EngineHost, student: Student, record_property: Any
) -> None:
    prompts, responses = _pairs()
    exact = teacher.call("hidden_states_float32", prompts, responses)
    payload = teacher.call("hidden_states", prompts, responses)
    head = student.models[0].lm_head
    worst = 0.0
    for bits, state in zip(payload, exact, strict=True):
        assert bits.dtype == np.uint16
        rounded = (bits.astype(np.uint32) << 16).view(np.float32)
        # Rounding to nearest: within half a unit of the eighth bit.
        np.testing.assert_allclose(rounded, state, rtol=2.0**-8, atol=1e-6)
        difference = head(torch.from_numpy(rounded)).log_softmax(-1) - head(
            torch.from_numpy(state)
        ).log_softmax(-1)
        worst = max(worst, float(difference.abs().max()))
    record_property("largest_logprob_error_of_bfloat16_states", worst)
    assert worst < 0.03


def test_texts_may_be_arrays(teacher: EngineHost) -> None:
    """Rows of an Arrow batch, which are read-only views of 32-bit integers. A state does not change."""
    texts = _pairs()
    columns = [pa.array(column, pa.list_(pa.int32())) for column in texts]
    arrays = [[row.values.to_numpy() for row in column] for column in columns]
    expected = teacher.call("hidden_states", *texts)
    assert all(map(np.array_equal, teacher.call("hidden_states", *arrays), expected))


# Calls that overlap


def _long(num_texts: int) -> tuple[list[list[int]], list[list[int]]]:
    source = random.Random(6)
    return [[1]] * num_texts, [
        [source.randrange(VOCABULARY) for _ in range(MAX_MODEL_TOKENS - 1)] for _ in range(num_texts)
    ]


def _check(
    student: Student, prompts: list[list[int]], responses: list[list[int]], running: Future[Any]
) -> None:
    for prompt, response, state in zip(prompts, responses, running.result(timeout=120), strict=True):
        got = student.models[0].lm_head(torch.from_numpy(state)).log_softmax(-1)
        torch.testing.assert_close(got, student.logprobs(0, prompt, response), rtol=0, atol=TOLERANCE)


def test_calls_at_the_same_time_get_their_own_states(teacher: EngineHost, student: Student) -> None:
    prompts, responses = _pairs()
    parts = [slice(0, 1), slice(1, 9), slice(9, 10), slice(10, 14)]
    running = [teacher.submit("hidden_states_float32", prompts[part], responses[part]) for part in parts]
    for part, states in zip(parts, running, strict=True):
        _check(student, prompts[part], responses[part], states)


def test_a_call_that_fails_leaves_the_others_alone(teacher: EngineHost, student: Student) -> None:
    """vLLM refuses a text that is too long, transformers cannot look up an id beyond the vocabulary."""
    prompts, responses = _pairs()
    good = [teacher.submit("hidden_states_float32", prompts[:4], responses[:4])]
    too_long = [0] * MAX_MODEL_TOKENS + [VOCABULARY if "Transformers" in teacher.class_path else 0]
    bad = teacher.submit("hidden_states_float32", [*prompts, [1]], [*responses, [*too_long, 0]])
    good.append(teacher.submit("hidden_states_float32", prompts[:4], responses[:4]))
    with pytest.raises((ConfigError, IndexError), match=r"have at most 1024 tokens|index out of range"):
        bad.result(timeout=120)
    for running in good:
        _check(student, prompts[:4], responses[:4], running)


def test_a_cancelled_call_frees_the_engine(teacher: EngineHost, student: Student) -> None:
    prompts, responses = _pairs()
    running, cancel = teacher.submit_to_cancel("hidden_states", *_long(2000))
    time.sleep(0.5)
    cancel()
    with pytest.raises(asyncio.CancelledError):
        running.result(timeout=60)
    short = teacher.submit("hidden_states_float32", prompts[:1], responses[:1])
    _check(student, prompts[:1], responses[:1], short)


def _start(kind: str, student: Student) -> EngineHost:
    class_path, settings = TEACHERS[kind]
    return EngineHost(class_path, str(student.folder), settings, max_model_tokens=MAX_MODEL_TOKENS)


@pytest.mark.parametrize("kind", TEACHERS)
def test_closing_does_not_wait_for_a_call(kind: str, student: Student) -> None:
    with closing(_start(kind, student)) as host:
        running = host.submit("hidden_states", *_long(2000))
        time.sleep(0.5)
        assert not running.done()
        start = time.monotonic()
    assert time.monotonic() - start < 20  # a call of 2,000 long texts takes minutes
    with pytest.raises(RuntimeError, match=r"^the teacher engine was closed$"):
        running.result(timeout=10)


def test_calls_fail_when_a_rank_of_the_teacher_dies(student: Student) -> None:
    with closing(_start("vllm-tp2", student)) as host:
        running = [host.submit("hidden_states", *_long(2000)), host.submit("hidden_states", *_pairs())]
        time.sleep(0.5)
        host.descendants()[0].kill()
        for call in running:
            with pytest.raises(EngineDied, match=r"^teacher engine must live; .*; check whether the machine"):
                call.result(timeout=60)
        with pytest.raises(EngineDied):
            host.call("hidden_states", *_pairs())
