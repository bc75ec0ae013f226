"""Benchmark ``rollout``: what the rollout actor adds to vLLM.

Ours is the path of the asynchronous rollout loop: one call of ``VllmGenerator.generate`` per draw, all draws in
flight together, rows built by the prompt table and appended to a segment store. Theirs is vLLM's AsyncLLM with the
engine arguments and the environment of ours, on the same prompts with the same limits and stop ids. ``bare`` samples
with the same seeds and returns the same log-probabilities, so it does the same work and gets texts of the same
length. ``plain`` does without both, and shows what they cost.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from deploy.benchmarks.harness import Measurement, Say, alternate, rates
from deploy.benchmarks.side import Side
from deploy.benchmarks.workload import draws, model_dir, open_store, prompt_table, scratch, stop_token_ids
from distill.config import RolloutConfig

NUM_PROMPTS, SAMPLES_PER_PROMPT, MAX_NEW_TOKENS = 64, 2, 64
MAX_MODEL_TOKENS = 512
_SEED = 0


def measure(num_pairs: int, say: Say) -> Measurement:
    """Alternate rounds on two living engines."""
    model = model_dir(say)
    with scratch() as folder:
        prompts = folder / "prompts.parquet"
        _write_prompts(model, prompts, say)
        common = {"model": str(model), "prompts": str(prompts), "stop": stop_token_ids(model)}
        say("starting two engines")
        with (
            Side("ours", f"{__name__}:OurRollouts", {**common, "folder": str(folder)}) as ours,
            Side("bare vLLM", f"{__name__}:BareRollouts", common) as bare,
        ):
            # Each side counts its rounds by itself, so that all of them have the same seeds in a round.
            first, second, third = (itertools.count() for _ in range(3))
            sides = {
                "ours": lambda: ours.call("sample", round_number=next(first)),
                "bare": lambda: bare.call("sample", round_number=next(second), like_ours=True),
                "plain": lambda: bare.call("sample", round_number=next(third), like_ours=False),
            }
            say("warm-up")
            for side in sides.values():
                side()
            rounds = alternate(num_pairs, sides, say)
            memory = {"ours": ours.pss_bytes(), "bare": bare.pss_bytes()}
    return Measurement(
        pairs={"bare": rates(rounds, "ours", "bare"), "plain": rates(rounds, "ours", "plain")},
        notes={
            "pss_bytes": memory,
            "num_tokens": {name: [found[name]["num_tokens"] for found in rounds] for name in sides},
            "num_requests": NUM_PROMPTS * SAMPLES_PER_PROMPT,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
    )


def _write_prompts(model: Path, path: Path, say: Say) -> None:
    from distill.data.tables import write_table

    write_table(prompt_table(model, NUM_PROMPTS, say), path)


def _prompts(path: str) -> Any:
    from distill.data.tables import PromptTable

    return PromptTable.read(
        path, samples_per_prompt=SAMPLES_PER_PROMPT, max_new_tokens=MAX_NEW_TOKENS, seed=_SEED
    )


def _draws(round_number: int) -> list[Any]:
    """The draws of a round: every prompt once. Each round has other seeds, so no text is sampled twice."""
    first = round_number * NUM_PROMPTS
    return draws("student_text", range(first, first + NUM_PROMPTS), NUM_PROMPTS)


class OurRollouts:
    """The engine of the rollout actor, its prompt table and its store."""

    def __init__(self, generator: Any, prompts: Any, store: Any) -> None:
        self._generator = generator
        self._prompts = prompts
        self._store = store

    @classmethod
    async def start(cls, model: str, prompts: str, stop: list[int], folder: str) -> Self:
        from actors.vllm_engine.generator import VllmGenerator

        generator = await VllmGenerator.start(
            model, RolloutConfig(), max_model_tokens=MAX_MODEL_TOKENS, stop_token_ids=stop
        )
        return cls(generator, _prompts(prompts), open_store(folder, "rollout"))

    async def sample(self, round_number: int) -> dict[str, float]:
        start = time.perf_counter()
        groups = await _roll_out(_draws(round_number), self._prompts, self._generator, self._store)
        seconds = time.perf_counter() - start
        self._store.settle(groups)
        return {"num_tokens": sum(group.num_tokens for group in groups), "seconds": seconds}

    async def close(self) -> None:
        await self._generator.close()


async def _roll_out(round_draws: Sequence[Any], prompts: Any, generator: Any, store: Any) -> list[Any]:
    """What the rollout loop does with draws that are admitted at the same time, without the replay index."""
    from distill.algorithm import roll_out

    found = await asyncio.gather(*(roll_out([draw], prompts, generator, store) for draw in round_draws))
    return [group for groups in found for group in groups]


class BareRollouts:
    """vLLM's AsyncLLM, as a program that needs only the text would use it."""

    def __init__(self, engine: Any, prompts: Any, stop: list[int]) -> None:
        self._engine = engine
        self._prompts = prompts
        self._stop = stop

    @classmethod
    async def start(cls, model: str, prompts: str, stop: list[int]) -> Self:
        arguments = _engine_arguments(model)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return cls(AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments)), _prompts(prompts), stop)

    async def sample(self, round_number: int, like_ours: bool) -> dict[str, float]:
        requests = self._prompts.requests(_draws(round_number))
        prompts = [request.prompt_tokens.tolist() for request in requests]
        start = time.perf_counter()
        lengths = await asyncio.gather(
            *(
                self._length(f"{like_ours}-{round_number}-{n}", prompt, request, like_ours)
                for n, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
            )
        )
        return {"num_tokens": sum(lengths), "seconds": time.perf_counter() - start}

    async def _length(self, request_id: str, prompt: list[int], request: Any, like_ours: bool) -> int:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=1.0,
            seed=request.seed if like_ours else None,
            logprobs=0 if like_ours else None,
            max_tokens=request.max_new_tokens,
            stop_token_ids=self._stop,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        num_tokens = 0
        async for output in self._engine.generate(tokens_input(prompt), params, request_id):
            num_tokens = len(output.outputs[0].token_ids)
        return num_tokens

    async def close(self) -> None:
        self._engine.shutdown()


def _engine_arguments(model: str) -> dict[str, Any]:
    """The engine arguments of ours without what only ours needs: the pushes and the watchdog."""
    from actors.vllm_engine.startup import STEP_TOKENS, current_device, engine_arguments, set_environment
    from distill.machine.hardware import usable_cores

    set_environment(usable_cores(), 1)
    device, settings = current_device(), RolloutConfig()
    arguments = engine_arguments(model, settings, MAX_MODEL_TOKENS, device)
    del arguments["worker_extension_cls"]
    on_cpu = device == "cpu"
    return arguments | {
        "max_num_seqs": settings.max_num_seqs,
        "enable_chunked_prefill": False if on_cpu else None,
        "max_num_batched_tokens": max(STEP_TOKENS, MAX_MODEL_TOKENS) if on_cpu else None,
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
        "enable_log_requests": False,
    }
