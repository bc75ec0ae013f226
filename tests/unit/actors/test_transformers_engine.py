"""The transformers engine in the test's process; tests/integration checks its contract."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save

from actors.transformers_engine import TransformersGenerator, TransformersTeacher
from distill.config import RolloutConfig, ScoringConfig
from distill.interfaces import SampleRequest
from distill.weights import StalePush, write_weights
from tests.tiny import save_tiny_llama


def test_a_state_depends_only_on_its_own_text(tmp_path: Path) -> None:
    """To the last bit, because a resumed run scores a corpus row together with different rows than before."""
    numbers = random.Random(0)
    texts = [[numbers.randrange(2, 258) for _ in range(numbers.randint(12, 60))] for _ in range(12)]
    prompts, responses = [text[:8] for text in texts], [text[8:] for text in texts]
    folder = str(save_tiny_llama(tmp_path / "teacher"))

    async def score() -> tuple[list[np.ndarray], list[np.ndarray]]:
        teacher = await TransformersTeacher.start(
            folder, ScoringConfig(dtype="float32"), max_model_tokens=128
        )
        together = await teacher.hidden_states_float32(prompts, responses)
        halves = [
            await teacher.hidden_states_float32(prompts[part], responses[part])
            for part in (slice(0, 5), slice(5, 12))
        ]
        await teacher.close()
        return together, halves[0] + halves[1]

    together, apart = asyncio.run(score())
    assert [len(states) for states in together] == [len(response) for response in responses]
    assert all(map(np.array_equal, together, apart))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("model") / "model"))


async def test_a_teacher_fails_one_call_and_closes_under_another(model: str) -> None:
    teacher = await TransformersTeacher.start(model, ScoringConfig(dtype="float32"), max_model_tokens=128)
    good = asyncio.create_task(teacher.hidden_states([[5, 6]], [np.array([7, 8, 9], np.int32)]))
    bad = asyncio.create_task(teacher.hidden_states([[5], [10**6]], [[6], [7]]))
    [states] = await good
    assert states.shape[0] == 3 and states.dtype == np.uint16
    with pytest.raises(IndexError):
        await bad
    long = asyncio.create_task(teacher.hidden_states([[5] * 100] * 10_000, [[6] * 28] * 10_000))
    await asyncio.sleep(0.05)
    await teacher.close()
    with pytest.raises(RuntimeError, match="was closed"):
        await long


async def test_a_generator_keeps_newer_weights_and_samples_without_seeds(model: str, tmp_path: Path) -> None:
    generator = await TransformersGenerator.start(
        model, RolloutConfig(dtype="float32"), max_model_tokens=128, stop_token_ids=[]
    )
    tensors = load_file(Path(model) / "model.safetensors")
    newer, older = (
        write_weights(tmp_path, lambda file: file.write(save(tensors)), policy_version=version, update=0)
        for version in (5, 4)
    )
    await generator.update_weights(newer)
    with pytest.raises(StalePush, match="be above 5"):
        await generator.update_weights(older)
    assert await generator.policy_version() == 5
    requests = [
        SampleRequest(prompt_tokens=np.array([5, 6]), max_new_tokens=30, seed=seed) for seed in (1, None)
    ]
    first, second = [await generator.generate(requests) for _ in range(2)]
    assert first[0] == second[0]
    assert first[1].response_tokens != second[1].response_tokens
    await generator.close()
