"""Every teacher returns the states that transformers computes, exact and as bfloat16 bits."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.engines import TOLERANCE, VOCABULARY, EngineHost, Student, make_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _pairs() -> tuple[list[list[int]], list[list[int]]]:
    prompts = make_prompts(14)
    lengths = itertools.cycle((1, 20, 3, 64, 100))
    source = random.Random(5)
    responses = [[source.randrange(VOCABULARY) for _ in range(next(lengths))] for _ in prompts]
    return prompts, responses


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
