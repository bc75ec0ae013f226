"""The fakes keep the parts of the engines' contract that the loops rely on."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from distill.interfaces import SampleRequest, WeightManifest
from distill.weights import StalePush
from tests.fakes import FakeGenerator, FakeTeacher


def _requests(*seeds: int | None) -> list[SampleRequest]:
    return [SampleRequest(prompt_tokens=np.arange(3), max_new_tokens=40, seed=seed) for seed in seeds]


def _push(policy_version: int) -> WeightManifest:
    return WeightManifest(policy_version=policy_version, update=0, path="", num_bytes=0, checksum="")


async def test_a_seed_decides_the_response() -> None:
    generator = FakeGenerator()
    first, second = [await generator.generate(_requests(1, None, 2, None)) for _ in range(2)]
    assert first[::2] == second[::2] and first[0] != first[2]
    assert first[1] != second[1] and first[1] != first[3]


async def test_only_newer_pushes_are_loaded() -> None:
    generator = FakeGenerator()
    await generator.update_weights(_push(3))
    for version in (2, 3):
        with pytest.raises(StalePush, match=rf"^policy version of a push={version} must be above 3"):
            await generator.update_weights(_push(version))
    assert await generator.policy_version() == 3
    await generator.update_weights(_push(4))


async def test_overlapping_calls_get_their_own_states() -> None:
    teacher = FakeTeacher()
    texts = [[np.array([number, number + 1], np.int32)] for number in range(5)]
    found = await asyncio.gather(*(teacher.hidden_states([[1]], text) for text in texts))
    for number, [states] in enumerate(found):
        assert states.dtype == np.uint16
        assert states.tolist() == [[number] * teacher.width, [number + 1] * teacher.width]
