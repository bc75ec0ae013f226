"""The teacher: hidden states from vLLM's pooling runner."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from actors.step_loop import AFTER_DEATH, StepLoop
from actors.stepped_teacher import SteppedTeacher, text_tokens
from actors.vllm_engine.processes import end_processes, engine_processes, first_deaths
from actors.vllm_engine.startup import (
    STEP_TOKENS,
    current_device,
    engine_arguments,
    set_environment,
    stat_loggers,
)
from distill.config import ScoringConfig
from distill.errors import NO_VALUE, ConfigError
from distill.interfaces import EngineDied, Tokens
from distill.machine.hardware import usable_cores

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.pooling_params import PoolingParams
    from vllm.v1.engine.llm_engine import LLMEngine

_NAME = "teacher engine"


class VllmTeacher(SteppedTeacher):
    """Scores with vLLM's pooling runner; built by :meth:`start`.

    The model is in this process; with several ranks, it is in children that end with the process. When one of
    them dies, all calls raise EngineDied.
    """

    def __init__(self, loop: StepLoop, ranks: Sequence[psutil.Process]) -> None:
        super().__init__(loop)
        self._watch = asyncio.create_task(self._watch_ranks(ranks)) if ranks else None

    @classmethod
    async def start(
        cls,
        model_dir: str,
        settings: ScoringConfig,
        *,
        max_model_tokens: int,
        lock_step: bool = False,
        metrics_name: str | None = None,
    ) -> VllmTeacher:
        """Load the teacher; returns when it can score.

        ``lock_step``: compute one call after the other, so that timing does not decide which texts share a step.
        ``metrics_name``: publish vLLM's metrics through Ray under this name.

        Raises: ConfigError when the machine has fewer cores than ranks.
        """
        before = {process.pid for process in engine_processes()}
        loop = StepLoop(_NAME, lock_step=lock_step)
        await loop.start(partial(_start_teacher, model_dir, settings, max_model_tokens, metrics_name))
        return cls(loop, [process for process in engine_processes() if process.pid not in before])

    async def close(self) -> None:
        """End the ranks. The memory of a model in this process is freed when the process ends."""
        if self._watch is not None:
            self._watch.cancel()
        await super().close()
        await asyncio.to_thread(end_processes, engine_processes())

    async def _watch_ranks(self, ranks: Sequence[psutil.Process]) -> None:
        # The loop's thread can be waiting for the dead rank, so it does not report the death itself.
        dead = await first_deaths(ranks)
        self._loop.fail(EngineDied(_NAME, NO_VALUE, f"live; process {dead} has ended", AFTER_DEATH))


class _Pooling:
    """vLLM's engine as :class:`actors.step_loop.SteppedEngine`."""

    def __init__(self, engine: LLMEngine, params: PoolingParams) -> None:
        self._engine = engine
        self._params = params
        self._first_rows: dict[str, int] = {}
        """The first row that :meth:`step` returns of each text."""

    def add(self, request_id: str, prompt: Tokens, response: Tokens) -> None:
        """Accept a text. Raises: ConfigError when it is longer than ``max_model_tokens``."""
        from vllm.inputs import tokens_input

        tokens, limit = text_tokens(prompt, response), self._engine.model_config.max_model_len
        if len(tokens) > limit:
            raise ConfigError("text to score", f"{len(tokens)} tokens", f"have at most {limit} tokens")
        self._engine.add_request(request_id, tokens_input(tokens.tolist()), self._params)
        self._first_rows[request_id] = len(prompt) - 1

    def step(self) -> Iterator[tuple[str, Tensor]]:
        """Compute one batch; yields the texts that it completed."""
        for output in self._engine.step():
            first = self._first_rows.pop(output.request_id, None)
            if first is not None:  # not aborted by the consumer of an earlier text of this step
                states: Any = output.outputs
                yield output.request_id, states.data[first:]

    def abort(self, request_ids: list[str]) -> None:
        """Drop texts that have not finished."""
        for request_id in request_ids:
            self._first_rows.pop(request_id, None)
        self._engine.abort_request(request_ids)

    def close(self) -> None:
        """End the ranks."""
        self._engine.engine_core.shutdown()


def _start_teacher(
    model_dir: str, settings: ScoringConfig, max_model_tokens: int, metrics_name: str | None
) -> _Pooling:
    num_threads = settings.num_threads or usable_cores()
    set_environment(num_threads, settings.tensor_parallel_size)
    import torch
    from vllm import PoolingParams
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # Call this before vLLM's CPU worker disables it. The count is per thread, hence set in the one that works.
    torch.set_num_threads(max(1, num_threads // settings.tensor_parallel_size))
    arguments = EngineArgs(
        **engine_arguments(model_dir, settings, max_model_tokens, current_device(), metrics_name),
        runner="pooling",
        max_num_batched_tokens=max(STEP_TOKENS, max_model_tokens),
        pooler_config=PoolerConfig(task="token_embed", use_activation=False),
        # Without this, vLLM converts a bf16 model's states to float32, and we convert them back.
        hf_overrides={"head_dtype": "model"},
        # Cached positions return no states.
        enable_prefix_caching=False,
    )
    # Not vllm.LLM, because its scoring interface, which is not used here, requires a tokenizer.
    engine = LLMEngine.from_engine_args(arguments, stat_loggers=stat_loggers(metrics_name))
    return _Pooling(engine, PoolingParams(task="token_embed", use_activation=False))
