"""The teacher: hidden states from vLLM's pooling runner."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.threaded_teacher import ThreadedTeacher
from actors.vllm_engine.processes import end_processes, engine_processes
from actors.vllm_engine.startup import STEP_TOKENS, current_device, engine_arguments, set_environment
from distill.config import ScoringConfig
from distill.interfaces import Tokens
from distill.machine.hardware import usable_cores

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


class VllmTeacher(ThreadedTeacher):
    """Scores with vLLM's pooling runner; built by :meth:`start`.

    The model is in this process; with several ranks, it is in children that end with the process.
    """

    def __init__(self, engine: LLMEngine, thread: ThreadPoolExecutor) -> None:
        super().__init__(thread)
        self._engine = engine
        self._num_requests = 0

    @classmethod
    async def start(cls, model_dir: str, settings: ScoringConfig, *, max_model_tokens: int) -> VllmTeacher:
        """Load the teacher; returns when it can score.

        Raises: ConfigError when the machine has fewer cores than ranks.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="vllm-teacher")
        start = partial(_start_teacher, model_dir, settings, max_model_tokens)
        return cls(await asyncio.get_running_loop().run_in_executor(thread, start), thread)

    async def close(self) -> None:
        """End the ranks. The memory of a model in this process is freed when the process ends."""
        await self._in_thread(self._engine.engine_core.shutdown)
        self._thread.shutdown()
        await asyncio.to_thread(end_processes, engine_processes())

    def _states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[Any]:
        from vllm import PoolingParams
        from vllm.inputs import tokens_input

        params = PoolingParams(task="token_embed", use_activation=False)
        pairs: dict[str, int] = {}
        states: list[Any] = [None] * len(prompts)
        try:
            for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                self._num_requests += 1
                tokens = tokens_input([*map(int, prompt), *map(int, response[:-1])])
                self._engine.add_request(str(self._num_requests), tokens, params)
                pairs[str(self._num_requests)] = number
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    number = pairs[output.request_id]
                    states[number] = output.outputs.data[len(prompts[number]) - 1 :]  # pyright: ignore
        except BaseException:
            self._engine.abort_request(list(pairs))
            raise
        return states


def _start_teacher(model_dir: str, settings: ScoringConfig, max_model_tokens: int) -> LLMEngine:
    num_threads = settings.num_threads or usable_cores()
    set_environment(num_threads, settings.tensor_parallel_size)
    import torch
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # Call this before vLLM's CPU worker disables it. The count is per thread, hence set in the one that works.
    torch.set_num_threads(max(1, num_threads // settings.tensor_parallel_size))
    arguments = EngineArgs(
        **engine_arguments(model_dir, settings, max_model_tokens, current_device()),
        runner="pooling",
        max_num_batched_tokens=max(STEP_TOKENS, max_model_tokens),
        pooler_config=PoolerConfig(task="token_embed", use_activation=False),
        # Cached positions return no states.
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    # Not vllm.LLM, because its scoring interface, which is not used here, requires a tokenizer.
    return LLMEngine.from_engine_args(arguments)
