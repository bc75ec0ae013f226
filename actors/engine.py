"""vLLM behind the protocols Generator and Teacher; with :mod:`actors.weight_transfer` the
only modules that import it.

Importing this module is cheap: vLLM is imported when an engine starts, after the environment
variables that it reads at import are set. One process holds one engine.

On a CPU (and for a push through shared memory) everything here is exercised by the tests.
The GPU paths (``device="cuda"``; :meth:`VllmGenerator.init_transfer` and
:meth:`VllmGenerator.receive` for the nccl and ipc backends) are written against vLLM's
interface and were not run on a GPU.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from distill.config import RolloutConfig, ScoringConfig
from distill.errors import NO_VALUE, first_line
from distill.interfaces import Completion, EngineDied, SampleRequest, WeightManifest, WeightPushError
from distill.machine.hardware import resolve_dtype, usable_cores

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

_AFTER_DEATH = "look for a lack of memory (dmesg), then resume the run"
WORKER_EXTENSION = "actors.weight_transfer.WorkerExtension"
HOLDER_VARIABLE = "DISTILL_ENGINE_HOLDER"
"""Read by the watchdog of :mod:`actors.weight_transfer` in the processes started here."""

_STEP_TOKENS = 2048
"""Tokens computed in one step on a CPU; a whole sequence must fit."""

_CLOSE_AFTER_S = 10.0
"""How long an engine may take to end by itself before it is killed."""

_NEVER = -1e4
"""Added to a logit, it leaves no probability."""

_LIVENESS_S = 0.5
"""Between two looks at whether an engine's processes live."""


def _set_environment(num_threads: int, tensor_parallel_size: int) -> None:
    """What vLLM reads from the environment; before its first import in this process."""
    os.environ |= {
        # At WARNING a start on a CPU prints fifteen lines about what is absent by design.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        HOLDER_VARIABLE: str(os.getpid()),
        # One rank: the model runs in the engine core itself (or, for an offline LLM, in this
        # process), which saves a process and a message per step.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(max(1, num_threads // tensor_parallel_size)),
        # Waiting threads sleep instead of spinning: with any other work on the cores (a learner,
        # a second engine) a step waits for threads that are not running, ten times as long.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        "VLLM_CPU_OMP_THREADS_BIND": _thread_binding(num_threads, tensor_parallel_size),
    }
    # The size is an engine argument here (bytes); this variable knows whole GiB only.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


def _thread_binding(num_threads: int, tensor_parallel_size: int) -> str:
    """Cores of each rank as ``0,1|2,3``; one rank is left to the operating system."""
    if tensor_parallel_size == 1:
        return "nobind"
    cores = sorted(os.sched_getaffinity(0))[: max(num_threads, tensor_parallel_size)]
    share = len(cores) // tensor_parallel_size
    if share == 0:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} must be <= the cores of this machine "
            f"({len(cores)}); lower it"
        )
    ranks = (cores[rank * share : (rank + 1) * share] for rank in range(tensor_parallel_size))
    return "|".join(",".join(map(str, rank)) for rank in ranks)


def _engine_arguments(
    model_dir: str,
    settings: RolloutConfig | ScoringConfig,
    max_model_tokens: int,
    device: Literal["cpu", "cuda"],
) -> dict[str, Any]:
    """Engine arguments common to generation and scoring."""
    on_cpu = device == "cpu"
    return {
        "model": model_dir,
        "dtype": resolve_dtype(settings.dtype, device),
        "max_model_len": max_model_tokens,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        # The checkpoint's sampling defaults are not ours, and stop tokens are given.
        "generation_config": "vllm",
        "enforce_eager": on_cpu,  # compiling takes minutes on a CPU
        # vLLM's 128 on a CPU is longer than most prompts: nothing of a prompt would be shared
        # between the members of a group.
        "block_size": 32 if on_cpu else None,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * (1 << 30)) if on_cpu else None,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "worker_extension_cls": WORKER_EXTENSION,
    }


def _device() -> Literal["cpu", "cuda"]:
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


def _engine_processes() -> list[psutil.Process]:
    """Descendants of this process, without multiprocessing's own tracker."""
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "resource_tracker" not in "".join(_command_line(child))
    ]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _end_processes(processes: Sequence[psutil.Process]) -> None:
    """Wait for processes that were asked to end; kill those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=_CLOSE_AFTER_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=_CLOSE_AFTER_S)


class VllmGenerator:
    """Samples with vLLM's AsyncLLM; built by :meth:`start`.

    A push that fails leaves the engine in a state that nobody knows, so the engine is ended:
    requests in flight and all later calls raise the WeightPushError. When one of its processes
    dies they raise EngineDied: vLLM itself fails the requests it has queued, but leaves a
    pause, a push or a question that was under way waiting for ever.
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
        self._logit_bias = dict.fromkeys(never_sampled, _NEVER) or None
        self._processes = processes
        self._stop_token_ids = list(stop_token_ids)
        self._on_push = on_push
        self._lock_step = lock_step
        self._num_requests = 0
        self._scheduler = asyncio.Lock()  # held by whoever has paused the engine
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
    ) -> VllmGenerator:
        """Load a checkpoint; returns when it can sample.

        ``num_tokens``: sample from the first so many ids alone, the common vocabulary of two
        models that pad theirs differently; log-probabilities are over those. None: all.
        ``lock_step``: all requests of a call are admitted while the engine is paused, so that
        which of them share a step does not depend on timing. ``backend``: vLLM's weight
        transfer; a push by manifest needs ``shared_memory``.
        """
        num_threads = settings.num_threads or usable_cores()
        _set_environment(num_threads, settings.tensor_parallel_size)
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        before = {process.pid for process in _engine_processes()}
        device = _device()
        vocab_size = json.loads((Path(model_dir) / "config.json").read_text())["vocab_size"]
        never_sampled = range(vocab_size if num_tokens is None else num_tokens, vocab_size)
        arguments = AsyncEngineArgs(
            **_engine_arguments(model_dir, settings, max_model_tokens, device),
            max_num_seqs=settings.max_num_seqs,
            # On a CPU a prompt that is prefilled in pieces ends the engine when its request has
            # a seed (vLLM rewinds the generator, which a CPU generator cannot).
            enable_chunked_prefill=None if device == "cuda" else False,
            max_num_batched_tokens=None if device == "cuda" else max(_STEP_TOKENS, max_model_tokens),
            seed=seed,
            # Kept keys and values of older weights must not serve new requests.
            enable_prefix_caching=on_push == "recompute",
            weight_transfer_config=WeightTransferConfig(backend=backend),
            # With the bias of ids that are never sampled, if there are any.
            logprobs_mode="processed_logprobs" if never_sampled else "raw_logprobs",
            enable_log_requests=False,
            disable_log_stats=True,
        )
        engine = AsyncLLM.from_engine_args(arguments)
        processes = [process for process in _engine_processes() if process.pid not in before]
        return cls(
            engine,
            processes,
            stop_token_ids=stop_token_ids,
            on_push=on_push,
            lock_step=lock_step,
            never_sampled=never_sampled,
        )

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample all requests; answers in the order of the requests.

        Raises: WeightPushError or EngineDied, when that has happened before or meanwhile.
        """
        from vllm.sampling_params import SamplingParams

        params = [
            SamplingParams(
                temperature=1.0,
                top_p=1.0,
                seed=request.seed & (2**63 - 1),
                max_tokens=request.max_new_tokens,
                stop_token_ids=self._stop_token_ids,
                logprobs=0,  # of the sampled token only
                logit_bias=self._logit_bias,
                detokenize=False,
                output_kind=_final_only(),
            )
            for request in requests
        ]
        prompts = [request.prompt_tokens for request in requests]
        outputs = await self._tracked(self._run_all(prompts, params))
        return [_completion(output) for output in outputs]

    async def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """The most probable continuation of each prompt, the stop token included."""
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
        """Load a push; the receivers check its bytes before they touch the model.

        Raises: WeightPushError; the engine is ended then.
        """
        await self.receive(asdict(manifest), manifest.policy_version)

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """Meet the trainer of an nccl or ipc backend (not run on a GPU)."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def receive(self, update_info: dict[str, Any], policy_version: int) -> None:
        """One push through whatever backend the engine was started with.

        Requests in flight wait and go on under the new weights.
        """
        try:
            await self._tracked(self._push(update_info, policy_version))
        except EngineDied:
            raise
        except BaseException as error:
            failure = WeightPushError(
                f"push of policy version {policy_version}", NO_VALUE, f"be loaded ({first_line(error)})"
            )
            await self._discard(failure)
            if isinstance(error, Exception):
                raise failure from error
            raise  # cancelled, by a deadline for instance

    async def _push(self, update_info: dict[str, Any], policy_version: int) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self._engine
        async with self._scheduler:
            await engine.pause_generation(mode="keep", clear_cache=self._on_push == "recompute")
            await engine.start_weight_update()
            await engine.update_weights(WeightTransferUpdateRequest(update_info))
            await engine.finish_weight_update(weight_version=str(policy_version))
            if (version := _version(await engine.get_weight_version())) != policy_version:
                raise WeightPushError("policy version after a push", version, f"be {policy_version}")
            await engine.resume_generation()

    async def policy_version(self) -> int:
        """The version that samples now; 0 before the first push."""
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
        # Its finalizer shuts it down once more, which fails when the interpreter is ending.
        self._engine.shutdown = lambda timeout=None: None
        await asyncio.to_thread(_end_processes, descendants)

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args) from self._failure
        if self._closed:
            raise RuntimeError("this generator was closed")

    async def _watch_processes(self) -> None:
        # Children alone: the core ends with its ranks, and what else it starts may come and go.
        own = psutil.Process().children()
        watched = [process for process in self._processes if process in own]
        while all(map(_is_alive, watched)):
            await asyncio.sleep(_LIVENESS_S)
        dead = ", ".join(str(process.pid) for process in watched if not _is_alive(process))
        # In a task of its own: closing cancels this one.
        failure = EngineDied(
            "processes of the rollout engine", NO_VALUE, f"live; process {dead} has ended", _AFTER_DEATH
        )
        self._ending = asyncio.create_task(self._discard(failure))

    async def _discard(self, failure: WeightPushError | EngineDied) -> None:
        self._failure = self._failure or failure
        await self.close()

    async def _run_all(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        if self._lock_step:
            async with self._scheduler:
                # An empty prefix cache too: what it holds would depend on the calls before.
                await self._engine.pause_generation(mode="keep", clear_cache=True)
                queues = [await self._admit(*request) for request in zip(prompts, params, strict=True)]
                await self._engine.resume_generation()
        else:
            queues = [await self._admit(*request) for request in zip(prompts, params, strict=True)]
        return await _all_finished(self._engine, queues)

    async def _admit(self, prompt: Sequence[int], params: SamplingParams) -> Any:
        from vllm.inputs import tokens_input

        self._num_requests += 1
        tokens = tokens_input([int(token) for token in prompt])
        return await self._engine.add_request(str(self._num_requests), tokens, params)

    async def _tracked(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run ``work`` so that a failing push, or the engine's death, can end it."""
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
            raise EngineDied("rollout engine", NO_VALUE, "live; its core has ended", _AFTER_DEATH) from error
        finally:
            self._in_flight.discard(task)
            task.cancel()


async def _all_finished(engine: AsyncLLM, queues: Sequence[Any]) -> list[RequestOutput]:
    """The final output of each admitted request; aborts what is left when interrupted."""
    outputs = []
    try:
        for queue in queues:
            output = await queue.get()
            while not output.finished:
                output = await queue.get()
            outputs.append(output)
    except BaseException:
        if not engine.errored:
            await engine.abort([queue.request_id for queue in queues[len(outputs) :]], internal=True)
        raise
    return outputs


def _version(weight_version: str) -> int:
    """vLLM's name of the weights it was started with is ``default``."""
    return 0 if weight_version == "default" else int(weight_version)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


class VllmTeacher:
    """Scores with vLLM's pooling runner; built by :meth:`start`.

    The model lives in this process (with several ranks, in children that end with it), and
    one thread does all its work, so calls queue up and the event loop stays free.
    """

    def __init__(self, engine: LLMEngine, thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._thread = thread
        self._num_requests = 0
        self.hidden_size: int = engine.model_config.get_hidden_size()

    @classmethod
    async def start(cls, model_dir: str, settings: ScoringConfig, *, max_model_tokens: int) -> VllmTeacher:
        """Load the teacher; returns when it can score."""
        thread = ThreadPoolExecutor(1, thread_name_prefix="vllm-teacher")
        start = partial(_start_teacher, model_dir, settings, max_model_tokens)
        return cls(await asyncio.get_running_loop().run_in_executor(thread, start), thread)

    async def hidden_states(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """Final-norm state before each response token: one uint16 array [T, D] (bf16 bits) per pair."""
        return await self._in_thread(lambda: [_bfloat16_bits(s) for s in self._states(prompts, responses)])

    async def hidden_states_float32(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[np.ndarray]:
        """The same states before they are rounded: float32 arrays [T, D]."""
        return await self._in_thread(lambda: [s.float().numpy() for s in self._states(prompts, responses)])

    async def close(self) -> None:
        """End the ranks; in-process memory goes with the process."""
        await self._in_thread(self._engine.engine_core.shutdown)
        self._thread.shutdown()
        await asyncio.to_thread(_end_processes, _engine_processes())

    def _states(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Any]:
        from vllm import PoolingParams
        from vllm.inputs import tokens_input

        params = PoolingParams(task="token_embed", use_activation=False)
        pairs: dict[str, int] = {}
        states: list[Any] = [None] * len(prompts)
        try:
            for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                self._num_requests += 1
                # The state before response token t has seen the prompt and t tokens, so the
                # last token is never fed, and T rows begin at the prompt's last token.
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

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _start_teacher(model_dir: str, settings: ScoringConfig, max_model_tokens: int) -> LLMEngine:
    num_threads = settings.num_threads or usable_cores()
    _set_environment(num_threads, settings.tensor_parallel_size)
    import torch
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    # Before vLLM's CPU worker turns this function off. Per thread, hence in the one that works.
    torch.set_num_threads(max(1, num_threads // settings.tensor_parallel_size))
    arguments = EngineArgs(
        **_engine_arguments(model_dir, settings, max_model_tokens, _device()),
        runner="pooling",
        max_num_batched_tokens=max(_STEP_TOKENS, max_model_tokens),
        pooler_config=PoolerConfig(task="token_embed", use_activation=False),
        # Cached positions return no state.
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    # Not vllm.LLM: its scoring interface, which nothing here uses, asks for a tokenizer.
    return LLMEngine.from_engine_args(arguments)


def _bfloat16_bits(states: Any) -> np.ndarray:
    """Round to nearest even; the bits as uint16."""
    import torch

    return states.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
