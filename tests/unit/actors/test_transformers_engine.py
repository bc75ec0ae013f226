"""The transformers engine in the test's process; tests/integration checks its contract."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np

from actors.transformers_engine import TransformersTeacher
from distill.config import ScoringConfig
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
