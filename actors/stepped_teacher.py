"""What every teacher engine shares: a step loop does its work, and states leave it in two formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from actors.step_loop import StepLoop
from distill.interfaces import Tokens

if TYPE_CHECKING:
    from torch import Tensor


class SteppedTeacher:
    """Implements :class:`distill.interfaces.Teacher` over a :class:`actors.step_loop.SteppedEngine`."""

    def __init__(self, loop: StepLoop) -> None:
        """``loop``: of an engine that has started."""
        self._loop = loop

    @property
    def num_finished(self) -> int:
        return self._loop.num_finished

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        """Return the final-norm state before each response token: a uint16 array [T, D] (bf16 bits) per pair.

        Raises: EngineDied; RuntimeError after :meth:`close`; what the engine raises for one of the texts.
        """
        return await self._loop.call(prompts, responses, _bits)

    async def hidden_states_float32(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens]
    ) -> list[np.ndarray]:
        """Return the same states before they are rounded: float32 arrays [T, D]. The engines' tests compare these."""
        return await self._loop.call(prompts, responses, lambda states: states.float().numpy())

    async def close(self) -> None:
        """Fail the calls under way, and free the model."""
        await self._loop.close()


def text_tokens(prompt: Tokens, response: Tokens) -> np.ndarray:
    """Return what a teacher reads of a text, int64: all but the last response token.

    The state before a response token has seen the prompt and the response tokens before it, so the T states of a
    response begin at the prompt's last token.
    """
    return np.concatenate([np.asarray(prompt, np.int64), np.asarray(response[:-1], np.int64)])


def _bits(states: Tensor) -> np.ndarray:
    # Not above: it imports torch, which reads its environment then, and an engine sets that first.
    from distill.machine.bfloat16 import to_bits

    return to_bits(states)
