"""Every generator (vLLM on one rank and on two, plain transformers) samples from the policy itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import torch

from distill.interfaces import SampleRequest
from tests.integration.engines import (
    GENERATORS,
    MAX_MODEL_TOKENS,
    STOP_TOKENS,
    TOLERANCE,
    VOCABULARY,
    EngineHost,
    GeneratorHost,
    Student,
    check_completion,
    make_prompts,
    make_requests,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_responses_end_at_a_stop_token_or_at_the_limit(generator: GeneratorHost) -> None:
    requests = [
        dataclasses.replace(request, max_new_tokens=1 + number % 96)
        for number, request in enumerate(make_requests(96, 1))
    ]
    completions = generator.call("generate", requests)
    for completion, request in zip(completions, requests, strict=True):
        check_completion(completion, request)
        assert completion.policy_versions == [(0, generator.version)]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_what_has_ended_is_counted_while_a_call_runs(generator: GeneratorHost) -> None:
    """So a long call differs from an engine that hangs."""
    before = generator.call("num_finished")
    running = generator.submit("generate", make_requests(96, 96))
    seen = {0}
    while not running.done():
        seen.add(generator.call("num_finished") - before)
    running.result()
    assert generator.call("num_finished") - before == 96
    assert seen - {0, 96}


def test_logprobs_are_those_of_the_unmodified_policy(generator: GeneratorHost) -> None:
    """They are at temperature 1 over the whole vocabulary, in spite of the checkpoint's sampling defaults."""
    requests = make_requests(12, 48)
    for completion, request in zip(generator.call("generate", requests), requests, strict=True):
        expected = generator.student.sampled_logprobs(
            generator.weights, request.prompt_tokens, completion.response_tokens
        )
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seeds", [range(1500), [None] * 1500], ids=["seeded", "unseeded"])
def test_sample_frequencies_match_the_policy(generator: GeneratorHost, seeds: Sequence[int | None]) -> None:
    prompt = make_prompts(3)[1]
    requests = [SampleRequest(prompt_tokens=prompt, max_new_tokens=1, seed=seed) for seed in seeds]
    tokens = [completion.response_tokens[0] for completion in generator.call("generate", requests)]
    policy = generator.student.logprobs(generator.weights, prompt, [0]).exp()[0].double().numpy()
    counts = np.bincount(tokens, minlength=VOCABULARY)
    # Pearson's statistic over ten groups of equal mass: nine degrees of freedom, p = 1e-5.
    groups = np.minimum((policy.cumsum() * 10).astype(int), 9)
    expected = np.bincount(groups, policy, 10) * len(tokens)
    statistic = ((np.bincount(groups, counts, 10) - expected) ** 2 / expected).sum()
    assert statistic < 39


def test_a_seed_reproduces_its_response_in_any_batch(generator: GeneratorHost) -> None:
    requests = make_requests(12, 24)
    first = generator.call("generate", requests)
    again = generator.call("generate", requests[:6] + requests[8:])
    assert [c.response_tokens for c in again] == [c.response_tokens for c in first[:6] + first[8:]]
    others = generator.call("generate", make_requests(12, 24, seed=1))
    assert sum(a.response_tokens != b.response_tokens for a, b in zip(first, others, strict=True)) >= 10


def test_requests_with_and_without_seeds_share_a_batch(generator: GeneratorHost) -> None:
    seeded = make_requests(6, 24)
    unseeded = [dataclasses.replace(request, seed=None) for request in seeded]
    expected = [completion.response_tokens for completion in generator.call("generate", seeded)]
    mixed = [request for pair in zip(seeded, unseeded, strict=True) for request in pair]
    got = [completion.response_tokens for completion in generator.call("generate", mixed)]
    assert got[::2] == expected
    again = [completion.response_tokens for completion in generator.call("generate", mixed)]
    assert again[::2] == expected
    assert sum(a != b for a, b in zip(got[1::2], again[1::2], strict=True)) >= 5


def test_prompts_may_be_arrays(generator: GeneratorHost) -> None:
    """Rows of an Arrow batch, which are read-only views of 32-bit integers."""
    requests = make_requests(6, 24)
    rows = pa.array([request.prompt_tokens for request in requests], pa.list_(pa.int32()))
    arrays = [
        dataclasses.replace(request, prompt_tokens=row.values.to_numpy())
        for request, row in zip(requests, rows, strict=True)
    ]
    assert [c.response_tokens for c in generator.call("generate", arrays)] == [
        c.response_tokens for c in generator.call("generate", requests)
    ]
    prompts = [request.prompt_tokens for request in arrays]
    expected = generator.call("greedy", make_prompts(6), 12)
    assert generator.call("greedy", prompts, 12) == expected


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_ids_beyond_the_common_vocabulary_are_never_sampled(kind: str, students: dict[str, Student]) -> None:
    """Log-probabilities are those of the policy renormalized over the remaining ids."""
    class_path, settings, _, checkpoint = GENERATORS[kind]
    student, num_tokens = students[checkpoint], VOCABULARY // 3
    host = EngineHost(
        class_path,
        str(student.folder),
        settings,
        max_model_tokens=MAX_MODEL_TOKENS,
        stop_token_ids=STOP_TOKENS,
        num_tokens=num_tokens,
    )
    requests = make_requests(6, 24)
    sampled = 0
    for request, completion in zip(requests, host.call("generate", requests), strict=True):
        assert max(completion.response_tokens) < num_tokens
        rows = student.logprobs(0, request.prompt_tokens, completion.response_tokens)
        expected = rows[:, :num_tokens].log_softmax(-1)
        got = expected.gather(1, torch.tensor(completion.response_tokens)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(completion.logprobs, got, rtol=0, atol=TOLERANCE)
        sampled += len(got)
    assert sampled > 40
    assert max(token for text in host.call("greedy", make_prompts(6), 12) for token in text) < num_tokens
    host.close()
