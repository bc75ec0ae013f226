"""What every teacher engine shares: one thread does its work, and states leave it in two formats."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.interfaces import Tokens

if TYPE_CHECKING:
    from torch import Tensor


class ThreadedTeacher(ABC):
    """Implements :class:`distill.interfaces.Teacher` over :meth:`_states`, which blocks.

    One thread does all of the work, so calls queue up and the event loop stays free.
    """

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        """Return the final-norm state before each response token: a uint16 array [T, D] (bf16 bits) per pair."""
        # Not above: it imports torch, which reads its environment then, and an engine sets that first.
        from distill.machine.bfloat16 import to_bits

        return await self._in_thread(lambda: [to_bits(s) for s in self._states(prompts, responses)])

    async def hidden_states_float32(
        self, prompts: Sequence[Tokens], responses: Sequence[Tokens]
    ) -> list[np.ndarray]:
        """Return the same states before they are rounded: float32 arrays [T, D]. The engines' tests compare these."""
        return await self._in_thread(lambda: [s.float().numpy() for s in self._states(prompts, responses)])

    @abstractmethod
    async def close(self) -> None:
        """Free the model and end its processes."""

    @abstractmethod
    def _states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> Sequence[Tensor]:
        """[T, D] per pair: row t is the state that has seen the prompt and t response tokens.

        The last response token is therefore never fed, and the T rows begin at the prompt's last token.
        """

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
