"""Engines in processes of their own, and what the contract tests compare them with.

Production also runs every engine in a process of its own (:class:`EngineHost`). The reference is transformers
in the test's process. The model is a random two-layer Llama in float32, so small that starting an engine takes
most of the time.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import multiprocessing
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from actors.vllm_engine.processes import is_alive
from distill.config import RolloutConfig, ScoringConfig
from distill.interfaces import Completion, SampleRequest, WeightManifest
from distill.weights import write_weights

VOCABULARY = 1024
STOP_TOKENS = (2, 3, 4, 5)
MAX_MODEL_TOKENS = 1024
TOLERANCE = 1e-4
"""Largest difference of two log-probabilities in float32, in nats."""

POLICY_VERSIONS = itertools.count(1)
"""The policy versions of all pushes; none is used twice."""

GENERATORS: dict[str, tuple[str, RolloutConfig, dict[str, Any], str]] = {
    "vllm": (
        "actors.vllm_engine.generator.VllmGenerator",
        RolloutConfig(dtype="float32", kv_cache_gib=0.25),
        {"on_push": "recompute", "lock_step": True},
        "tied",
    ),
    "vllm-tp2": (
        "actors.vllm_engine.generator.VllmGenerator",
        RolloutConfig(dtype="float32", kv_cache_gib=0.25, tensor_parallel_size=2),
        {"on_push": "keep_kv"},
        "untied",
    ),
    "transformers": (
        "actors.transformers_engine.TransformersGenerator",
        RolloutConfig(dtype="float32"),
        {"on_push": "recompute"},
        "tied",
    ),
}
"""By name: class, settings, further arguments, and which student the engine starts from."""

TEACHERS: dict[str, tuple[str, ScoringConfig]] = {
    "vllm": ("actors.vllm_engine.teacher.VllmTeacher", ScoringConfig(dtype="float32", kv_cache_gib=0.25)),
    "vllm-tp2": (
        "actors.vllm_engine.teacher.VllmTeacher",
        ScoringConfig(dtype="float32", kv_cache_gib=0.25, tensor_parallel_size=2),
    ),
    "transformers": ("actors.transformers_engine.TransformersTeacher", ScoringConfig(dtype="float32")),
}
"""By name: class and settings."""


class EngineHost:
    """An engine in a process of its own, whose async methods the test calls."""

    def __init__(self, class_path: str, *args: Any, **kwargs: Any) -> None:
        self.class_path = class_path
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, class_path, args, kwargs))
        self.process.start()
        theirs.close()
        self._numbers = itertools.count(1)
        self._futures: dict[int, Future[Any]] = {-1: Future()}
        started = self._futures[-1]
        threading.Thread(target=self._read, daemon=True).start()
        started.result(timeout=200)

    def submit(self, method: str, *args: Any) -> Future[Any]:
        """Call a method, or read an attribute, without waiting for the result."""
        return self._send(next(self._numbers), method, args)

    def submit_to_cancel(self, method: str, *args: Any) -> tuple[Future[Any], Callable[[], None]]:
        """As :meth:`submit`, with a function that cancels the coroutine in the engine's process."""
        number = next(self._numbers)
        return self._send(number, method, args), lambda: self._pipe.send((number, "cancel", ()))

    def _send(self, number: int, method: str, args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._futures[number] = future
        self._pipe.send((number, method, args))
        return future

    def call(self, method: str, *args: Any) -> Any:
        return self.submit(method, *args).result(timeout=120)

    def descendants(self) -> list[psutil.Process]:
        """Return the processes below the host's, without multiprocessing's resource tracker."""
        children = filter(is_alive, psutil.Process(self.process.pid).children(recursive=True))
        return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

    def close(self) -> None:
        """End the engine and check that every process it started has ended."""
        if self.process.is_alive():
            started = self.descendants()
            self.submit("close")
            self.process.join(timeout=60)
            assert [process for process in started if process.is_running()] == []
        assert not self.process.is_alive()

    def _read(self) -> None:
        while True:
            try:
                number, result, error = self._pipe.recv()
            except (EOFError, OSError):
                for future in self._futures.values():
                    future.set_exception(ConnectionError("the engine's process has ended"))
                return
            future = self._futures.pop(number)
            future.set_exception(error) if error is not None else future.set_result(result)


def _serve(pipe: Any, class_path: str, args: Any, kwargs: Any) -> None:
    asyncio.run(_serve_async(pipe, class_path, args, kwargs))


async def _serve_async(pipe: Any, class_path: str, args: Any, kwargs: Any) -> None:
    module, name = class_path.rsplit(".", 1)
    engine = await getattr(importlib.import_module(module), name).start(*args, **kwargs)
    pipe.send((-1, None, None))

    async def answer(number: int, method: str, arguments: Any) -> None:
        try:
            attribute = getattr(engine, method)
            result = await attribute(*arguments) if callable(attribute) else attribute
        except (Exception, asyncio.CancelledError) as error:
            pipe.send((number, None, error))
        else:
            pipe.send((number, result, None))

    tasks: dict[int, asyncio.Task[None]] = {}
    while True:
        number, method, arguments = await asyncio.to_thread(pipe.recv)
        if method == "close":
            await answer(number, method, arguments)
            await asyncio.gather(*tasks.values())
            return
        if method == "cancel":
            tasks[number].cancel()
            continue
        tasks[number] = asyncio.create_task(answer(number, method, arguments))


class Student:
    """A checkpoint, a second set of weights, and what transformers computes with each of them."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_MODEL_TOKENS,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=STOP_TOKENS[0],
            tie_word_embeddings=tied,
        )
        self.models = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            self.models.append(LlamaForCausalLM(config).eval().requires_grad_(False))
        self.folder = folder / "model"
        self.models[0].generation_config = GenerationConfig(
            eos_token_id=list(STOP_TOKENS), temperature=0.3, do_sample=True
        )
        self.models[0].save_pretrained(self.folder)
        self.segments = folder / "segments"

    def write_push(
        self, weights: int, policy_version: int, dtype: torch.dtype = torch.float32
    ) -> WeightManifest:
        tensors = {name: tensor.to(dtype) for name, tensor in self.models[weights].named_parameters()}
        return write_weights(
            self.segments,
            lambda file: file.write(save(tensors)),
            policy_version=policy_version,
            update=policy_version,
        )

    def logprobs(self, weights: int, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        """Compute full-vocabulary log-probabilities [T, V] before each response token."""
        tokens = torch.tensor([[*prompt, *response]])
        logits = self.models[weights](tokens).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1)

    def sampled_logprobs(self, weights: int, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
        rows = self.logprobs(weights, prompt, response)
        return rows.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()

    def greedy(self, weights: int, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(max_new_tokens):
            tokens.append(int(self.models[weights](torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] in STOP_TOKENS:
                break
        return tokens[len(prompt) :]


class GeneratorHost(EngineHost):
    """A generator that keeps track of the weights that were last pushed into it."""

    def __init__(self, kind: str, students: dict[str, Student]) -> None:
        class_path, settings, arguments, checkpoint = GENERATORS[kind]
        self.student = students[checkpoint]
        super().__init__(
            class_path,
            str(self.student.folder),
            settings,
            max_model_tokens=MAX_MODEL_TOKENS,
            stop_token_ids=STOP_TOKENS,
            **arguments,
        )
        self.on_push = arguments["on_push"]
        self.version = 0
        self.weights = 0

    def push(self, weights: int) -> None:
        manifest = self.student.write_push(weights, next(POLICY_VERSIONS))
        self.call("update_weights", manifest)
        self.version, self.weights = manifest.policy_version, weights


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts with lengths around the engine's block size; the shortest is one token."""
    generator = random.Random(seed)
    lengths = itertools.cycle((1, 7, 31, 32, 33, 70))
    return [[generator.randrange(10, VOCABULARY) for _ in range(next(lengths))] for _ in range(count)]


def make_requests(count: int, max_new_tokens: int, seed: int = 0) -> list[SampleRequest]:
    return [
        SampleRequest(prompt_tokens=prompt, max_new_tokens=max_new_tokens, seed=1000 * seed + number)
        for number, prompt in enumerate(make_prompts(count))
    ]


def check_completion(completion: Completion, request: SampleRequest) -> None:
    tokens = completion.response_tokens
    assert len(completion.logprobs) == len(tokens)
    assert 1 <= len(tokens) <= request.max_new_tokens
    assert not set(tokens[:-1]) & set(STOP_TOKENS)
    if completion.finish_reason == "stop":
        assert tokens[-1] in STOP_TOKENS
    else:
        assert completion.finish_reason == "length"
        assert len(tokens) == request.max_new_tokens
        assert tokens[-1] not in STOP_TOKENS
