"""The generator: sampling and weight pushes with vLLM's AsyncLLM."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from actors.step_loop import AFTER_DEATH
from actors.vllm_engine.processes import end_processes, engine_processes, first_deaths
from actors.vllm_engine.startup import (
    STEP_TOKENS,
    current_device,
    engine_arguments,
    set_environment,
    stat_loggers,
)
from distill.config import RolloutConfig
from distill.errors import NO_VALUE, first_line
from distill.interfaces import (
    Completion,
    EngineDied,
    SampleRequest,
    Tokens,
    WeightManifest,
    WeightPushError,
)
from distill.machine.hardware import usable_cores
from distill.weights import StalePush, require_newer, verify_once

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

Check = Callable[[], Awaitable[None]]

_EXCLUDING_BIAS = -1e4
"""Added to a logit, it leaves the token a probability of zero."""


class VllmGenerator:
    """Samples with vLLM's AsyncLLM; built by :meth:`start`.

    A push that fails leaves the weights in an unknown state, so it ends the engine: requests in flight and
    all later calls raise its WeightPushError. When a process of the engine dies, they raise EngineDied.
    vLLM itself fails the requests it has queued, but lets a pause, a push or a query that is under way wait
    for ever.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        processes: list[psutil.Process],
        *,
        stop_token_ids: Sequence[int],
        on_push: Literal["recompute", "keep_kv"],
        lock_step: bool,
        never_sampled: range,
    ) -> None:
        self._engine = engine
        self._logit_bias = dict.fromkeys(never_sampled, _EXCLUDING_BIAS) or None
        self._processes = processes
        self._stop_token_ids = list(stop_token_ids)
        self._on_push = on_push
        self._lock_step = lock_step
        self._num_requests = 0
        self.num_finished = 0
        self._scheduler = asyncio.Lock()  # to be acquired before pausing the engine
        self._pushing = asyncio.Lock()  # one push at a time, and the later version wins
        self._newest_version = 0
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._failure: WeightPushError | EngineDied | None = None
        self._closed = False
        self._watch = asyncio.create_task(self._watch_processes())
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        model_dir: str,
        settings: RolloutConfig,
        *,
        max_model_tokens: int,
        stop_token_ids: Sequence[int],
        num_tokens: int | None = None,
        on_push: Literal["recompute", "keep_kv"] = "recompute",
        seed: int = 0,
        lock_step: bool = False,
        backend: str = "shared_memory",
        metrics_name: str | None = None,
    ) -> VllmGenerator:
        """Load a checkpoint; returns when the engine can sample.

        ``num_tokens``: sample only from the first ``num_tokens`` ids, the common vocabulary of two models
        that pad theirs differently, and normalize log-probabilities over those. None: sample from all.
        ``lock_step``: admit all requests of a call while the engine is paused, so that timing does not
        decide which of them share a step. ``backend``: the backend of vLLM's weight transfer; a push by
        manifest needs ``shared_memory``, and no run uses another one yet. ``metrics_name``: publish vLLM's
        metrics through Ray under this name.

        Raises: ConfigError when the machine has fewer cores than ranks.
        """
        num_threads = settings.num_threads or usable_cores()
        set_environment(num_threads, settings.tensor_parallel_size)
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        before = {process.pid for process in engine_processes()}
        device = current_device()
        vocab_size = json.loads((Path(model_dir) / "config.json").read_text())["vocab_size"]
        never_sampled = range(vocab_size if num_tokens is None else num_tokens, vocab_size)
        arguments = AsyncEngineArgs(
            **engine_arguments(model_dir, settings, max_model_tokens, device, metrics_name),
            max_num_seqs=settings.max_num_seqs,
            # On a CPU, a seeded request whose prompt is prefilled in chunks ends the engine: vLLM rewinds
            # the random generator, which a CPU generator does not support.
            enable_chunked_prefill=None if device == "cuda" else False,
            max_num_batched_tokens=None if device == "cuda" else max(STEP_TOKENS, max_model_tokens),
            seed=seed,
            # Cached keys and values of older weights must not serve new requests.
            enable_prefix_caching=on_push == "recompute",
            weight_transfer_config=WeightTransferConfig(backend=backend),
            # Processed log-probabilities include the bias that excludes ids.
            logprobs_mode="processed_logprobs" if never_sampled else "raw_logprobs",
            enable_log_requests=False,
        )
        engine = AsyncLLM.from_engine_args(arguments, stat_loggers=stat_loggers(metrics_name))
        processes = [process for process in engine_processes() if process.pid not in before]
        return cls(
            engine,
            processes,
            stop_token_ids=stop_token_ids,
            on_push=on_push,
            lock_step=lock_step,
            never_sampled=never_sampled,
        )

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample all requests; returns completions in the order of the requests.

        Raises: WeightPushError or EngineDied, also when the failure happened before the call.
        """
        from vllm.sampling_params import SamplingParams

        params = [
            SamplingParams(
                temperature=1.0,
                top_p=1.0,
                seed=None if request.seed is None else request.seed & (2**63 - 1),
                max_tokens=request.max_new_tokens,
                stop_token_ids=self._stop_token_ids,
                logprobs=0,  # only that of the sampled token
                logit_bias=self._logit_bias,
                detokenize=False,
                output_kind=_final_only(),
            )
            for request in requests
        ]
        prompts = [request.prompt_tokens for request in requests]
        outputs = await self._tracked(self._run_all(prompts, params))
        return [_completion(output) for output in outputs]

    async def greedy(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuation of each prompt, stop token included."""
        from vllm.sampling_params import SamplingParams

        params = SamplingParams(
            temperature=0.0,
            logit_bias=self._logit_bias,
            max_tokens=max_new_tokens,
            stop_token_ids=self._stop_token_ids,
            detokenize=False,
            output_kind=_final_only(),
        )
        outputs = await self._tracked(self._run_all(prompts, [params] * len(prompts)))
        return [list(output.outputs[0].token_ids) for output in outputs]

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a push. Its bytes are checked before the engine pauses, and sampling continues meanwhile.

        Raises: WeightPushError after ending the engine; StalePush without ending it; EngineDied.
        """
        await self.receive(
            asdict(manifest), manifest.policy_version, lambda: asyncio.to_thread(verify_once, manifest)
        )

    async def receive(
        self, update_info: dict[str, Any], policy_version: int, check: Check | None = None
    ) -> None:
        """Receive a push through the backend that the engine was started with.

        Requests in flight wait, and continue under the new weights. ``check``: runs before the engine pauses.

        Raises: WeightPushError after ending the engine; StalePush without ending it; EngineDied.
        """
        try:
            await self._tracked(self._push(update_info, policy_version, check))
        except (EngineDied, StalePush):
            raise
        except BaseException as error:
            failure = WeightPushError(
                f"push of policy version {policy_version}", NO_VALUE, f"be loaded ({first_line(error)})"
            )
            await self._discard(failure)
            if isinstance(error, Exception):
                raise failure from error
            raise  # cancelled, for example by a deadline

    async def _push(
        self, update_info: dict[str, Any], policy_version: int, check: Check | None = None
    ) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._engine
        async with self._pushing:
            require_newer(policy_version, self._newest_version)
            if check is not None:
                await check()
            async with self._scheduler:
                await engine.pause_generation(mode="keep", clear_cache=self._on_push == "recompute")
                await engine.start_weight_update()
                await engine.update_weights(WeightTransferUpdateRequest(update_info))
                await engine.finish_weight_update(weight_version=str(policy_version))
                if (version := _version(await engine.get_weight_version())) != policy_version:
                    raise WeightPushError("policy version after a push", version, f"be {policy_version}")
                await engine.resume_generation()
            self._newest_version = policy_version

    async def policy_version(self) -> int:
        """Return the policy version that samples now; 0 before the first push."""
        return _version(await self._tracked(self._engine.get_weight_version()))

    async def close(self) -> None:
        """End the engine core and its workers."""
        if self._closed:
            return
        self._closed = True
        self._watch.cancel()
        for task in self._in_flight:
            task.cancel()
        descendants = [*self._processes]
        for process in self._processes:
            if process.is_running():
                descendants += process.children(recursive=True)
        self._engine.shutdown()
        # The engine's finalizer shuts it down again, which fails while the interpreter exits.
        self._engine.shutdown = lambda timeout=None: None
        await asyncio.to_thread(end_processes, descendants)

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args) from self._failure
        if self._closed:
            raise RuntimeError("this generator was closed")

    async def _watch_processes(self) -> None:
        # Watch only children of this process: the core ends when one of its ranks does, and other
        # descendants come and go.
        own = psutil.Process().children()
        dead = await first_deaths([process for process in self._processes if process in own])
        failure = EngineDied(
            "processes of the rollout engine", NO_VALUE, f"live; process {dead} has ended", AFTER_DEATH
        )
        # In a separate task, because closing cancels this one.
        self._ending = asyncio.create_task(self._discard(failure))

    async def _discard(self, failure: WeightPushError | EngineDied) -> None:
        self._failure = self._failure or failure
        await self.close()

    async def _run_all(
        self, prompts: Sequence[Tokens], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        if self._lock_step:
            async with self._scheduler:
                # Clear the prefix cache, because its contents depend on earlier calls.
                await self._engine.pause_generation(mode="keep", clear_cache=True)
                queues = [await self._admit(*request) for request in zip(prompts, params, strict=True)]
                await self._engine.resume_generation()
        else:
            queues = [await self._admit(*request) for request in zip(prompts, params, strict=True)]
        return await self._all_finished(queues)

    async def _all_finished(self, queues: Sequence[Any]) -> list[RequestOutput]:
        """Return the final output of each admitted request; aborts the remaining ones when interrupted."""
        outputs = []
        try:
            for queue in queues:
                output = await queue.get()
                while not output.finished:
                    output = await queue.get()
                outputs.append(output)
                self.num_finished += 1
        except BaseException:
            if not self._engine.errored:
                unfinished = [queue.request_id for queue in queues[len(outputs) :]]
                await self._engine.abort(unfinished, internal=True)
            raise
        return outputs

    async def _admit(self, prompt: Tokens, params: SamplingParams) -> Any:
        from vllm.inputs import tokens_input

        self._num_requests += 1
        tokens = tokens_input(prompt.tolist() if isinstance(prompt, np.ndarray) else list(prompt))
        return await self._engine.add_request(str(self._num_requests), tokens, params)

    async def _tracked(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run ``work`` so that a failing push, or the death of the engine, can cancel it."""
        try:
            self._check_usable()
        except BaseException:
            work.close()
            raise
        from vllm.v1.engine.exceptions import EngineDeadError

        task = asyncio.ensure_future(work)
        self._in_flight.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            self._check_usable()
            raise
        except EngineDeadError as error:
            raise EngineDied("rollout engine", NO_VALUE, "live; its core has ended", AFTER_DEATH) from error
        finally:
            self._in_flight.discard(task)
            task.cancel()


def _version(weight_version: str) -> int:
    """Return the policy version; vLLM calls the weights it was started with ``default``."""
    return 0 if weight_version == "default" else int(weight_version)


def _final_only() -> Any:
    from vllm.sampling_params import RequestOutputKind

    return RequestOutputKind.FINAL_ONLY


def _completion(output: RequestOutput) -> Completion:
    sample = output.outputs[0]
    tokens = list(sample.token_ids)
    finish_reason = sample.finish_reason
    if finish_reason not in ("stop", "length") or sample.logprobs is None:
        raise RuntimeError(f"request {output.request_id} ended with {finish_reason}")
    logprobs = [
        (position or {})[token].logprob for token, position in zip(tokens, sample.logprobs, strict=True)
    ]
    spans = [(span.start, _version(span.version)) for span in sample.weight_versions or ()]
    return Completion(
        response_tokens=tokens,
        logprobs=logprobs,
        policy_versions=spans or [(0, 0)],
        finish_reason=finish_reason,  # pyright: ignore[reportArgumentType]
    )
