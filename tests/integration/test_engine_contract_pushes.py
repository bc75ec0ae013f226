"""Weight pushes into every generator: what samples afterwards, and what a broken push does."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from distill.interfaces import WeightPushError
from distill.weights import StalePush, remove_old_weights, write_weights
from tests.integration.engines import (
    POLICY_VERSIONS,
    TOLERANCE,
    GeneratorHost,
    check_completion,
    make_prompts,
    make_requests,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_every_push_takes_effect_also_one_of_earlier_weights(generator: GeneratorHost) -> None:
    prompts = make_prompts(8)
    texts = {weights: [generator.student.greedy(weights, p, 12) for p in prompts] for weights in (0, 1)}
    assert texts[0] != texts[1]
    for weights in (1, 0, 1, 0):
        generator.push(weights)
        assert generator.call("policy_version") == generator.version
        assert generator.call("greedy", prompts, 12) == texts[weights]


def test_requests_in_flight_survive_a_push(generator: GeneratorHost) -> None:
    requests = make_requests(16, 900)
    for after_s in (0.4, 1.6, 6.4):  # the machine decides when the first tokens exist
        generator.push(0)
        before = generator.version
        running = generator.submit("generate", requests)
        time.sleep(after_s)
        generator.push(1)
        completions = running.result(timeout=120)
        if two_spans := [c for c in completions if len(c.policy_versions) == 2]:
            break
    assert two_spans
    for completion, request in zip(completions, requests, strict=True):
        check_completion(completion, request)
        starts = [start for start, _ in completion.policy_versions]
        versions = [version for _, version in completion.policy_versions]
        assert starts[0] == 0
        assert versions in ([before], [before, generator.version], [generator.version])
        old = (
            starts[1] if len(starts) == 2 else 0 if versions != [before] else len(completion.response_tokens)
        )
        got = np.array(completion.logprobs)
        expected = [
            generator.student.sampled_logprobs(weights, request.prompt_tokens, completion.response_tokens)
            for weights in (0, 1)
        ]
        np.testing.assert_allclose(got[:old], expected[0][:old], rtol=0, atol=TOLERANCE)
        if generator.on_push == "recompute":
            np.testing.assert_allclose(got[old:], expected[1][old:], rtol=0, atol=TOLERANCE)
    generator.push(0)


def test_an_older_push_is_refused_and_changes_nothing(generator: GeneratorHost) -> None:
    prompts = make_prompts(4)
    older, equal = (generator.student.write_push(1, next(POLICY_VERSIONS)) for _ in range(2))
    generator.push(0)
    generator.push(1)
    newest = generator.version
    texts = generator.call("greedy", prompts, 12)
    for manifest in (older, equal, dataclasses.replace(equal, policy_version=newest)):
        with pytest.raises(
            StalePush, match=rf"policy version of a push={manifest.policy_version} must be above {newest}, "
        ):
            generator.call("update_weights", manifest)
    assert generator.call("policy_version") == newest
    assert generator.call("greedy", prompts, 12) == texts
    generator.push(0)


def test_a_push_in_bfloat16_loads_the_rounded_weights(generator: GeneratorHost) -> None:
    """A run pushes in the engine's format. These engines compute in float32, which shows the values they loaded."""
    manifest = generator.student.write_push(1, next(POLICY_VERSIONS), torch.bfloat16)
    generator.call("update_weights", manifest)
    request = make_requests(1, 24)[0]
    [completion] = generator.call("generate", [request])
    rounded = copy.deepcopy(generator.student.models[1])
    for parameter in rounded.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    tokens = torch.tensor([[*request.prompt_tokens, *completion.response_tokens]])
    rows = rounded(tokens).logits[0, len(request.prompt_tokens) - 1 : -1].log_softmax(-1)
    expected = rows.gather(1, torch.tensor(completion.response_tokens)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=TOLERANCE)
    generator.push(0)


def test_a_push_leaves_its_file_free_to_be_removed(generator: GeneratorHost) -> None:
    generator.push(1)
    generator.push(0)
    folder = generator.student.segments
    remove_old_weights(folder, before=generator.version + 1)
    assert list(folder.iterdir()) == []


def test_a_corrupted_push_is_rejected_and_ends_the_engine(generator: GeneratorHost) -> None:
    manifest = generator.student.write_push(1, next(POLICY_VERSIONS))
    content = bytearray(Path(manifest.path).read_bytes())
    content[len(content) // 2] ^= 4
    Path(manifest.path).write_bytes(content)
    running = generator.submit("generate", make_requests(16, 900))
    time.sleep(0.2)
    message = rf"checksum=[0-9a-f]{{16}} must be {manifest.checksum} \(xxh3-64\)"
    with pytest.raises(WeightPushError, match=message):
        generator.call("update_weights", manifest)
    with pytest.raises(WeightPushError, match=message):
        running.result(timeout=30)
    with pytest.raises(WeightPushError, match=message):
        generator.call("generate", make_requests(1, 4))
    with pytest.raises(WeightPushError, match=message):
        generator.call("policy_version")
    assert generator.descendants() == []
    generator.close()


@pytest.mark.parametrize("generator", ["vllm", "transformers"], indirect=True)
def test_a_push_with_a_missing_parameter_is_rejected(generator: GeneratorHost) -> None:
    tensors = dict(generator.student.models[1].named_parameters())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    manifest = write_weights(
        generator.student.segments,
        lambda file: file.write(save(tensors)),
        policy_version=next(POLICY_VERSIONS),
        update=0,
    )
    name = r"model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(
        WeightPushError, match=rf"parameter {name} must be there|shape of {name}=none must be [(\[]\d+, \d+"
    ):
        generator.call("update_weights", manifest)
    generator.close()
