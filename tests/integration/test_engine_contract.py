"""One contract, every engine: vLLM (one rank and two) and plain transformers.

Engines run in processes of their own (:class:`EngineHost`), as they do in production; the
reference is transformers in the test's process. The model is a random two-layer Llama in
float32, small enough that starting is what takes the time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import itertools
import multiprocessing
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from distill.config import RolloutConfig, ScoringConfig
from distill.interfaces import Completion, EngineDied, SampleRequest, WeightManifest, WeightPushError
from distill.weights import write_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

VOCABULARY = 1024
STOP_TOKENS = (2, 3, 4, 5)
MAX_MODEL_TOKENS = 1024
TOLERANCE = 1e-4
"""Of a log-probability, in nats, float32 against float32."""

_VERSIONS = itertools.count(1)
"""Policy versions of all pushes: never used twice."""

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
TEACHERS: dict[str, tuple[str, ScoringConfig]] = {
    "vllm": ("actors.vllm_engine.teacher.VllmTeacher", ScoringConfig(dtype="float32", kv_cache_gib=0.25)),
    "vllm-tp2": (
        "actors.vllm_engine.teacher.VllmTeacher",
        ScoringConfig(dtype="float32", kv_cache_gib=0.25, tensor_parallel_size=2),
    ),
    "transformers": ("actors.transformers_engine.TransformersTeacher", ScoringConfig(dtype="float32")),
}


class EngineHost:
    """An engine in a process of its own; its async methods are called from here."""

    def __init__(self, class_path: str, *args: Any, **kwargs: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, class_path, args, kwargs))
        self.process.start()
        theirs.close()
        self._numbers = itertools.count()
        self._futures: dict[int, Future[Any]] = {-1: Future()}
        started = self._futures[-1]
        threading.Thread(target=self._read, daemon=True).start()
        started.result(timeout=200)

    def submit(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        number = next(self._numbers)
        self._futures[number] = future
        self._pipe.send((number, method, args))
        return future

    def call(self, method: str, *args: Any) -> Any:
        return self.submit(method, *args).result(timeout=120)

    def descendants(self) -> list[psutil.Process]:
        """Processes below the host's, without multiprocessing's tracker."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

    def close(self) -> None:
        """End the engine; nothing that it started may be left."""
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
        except Exception as error:
            pipe.send((number, None, error))
        else:
            pipe.send((number, result, None))

    tasks = set()
    while True:
        number, method, arguments = await asyncio.to_thread(pipe.recv)
        if method == "close":
            await answer(number, method, arguments)
            return
        task = asyncio.create_task(answer(number, method, arguments))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


class Student:
    """A checkpoint, other weights for it, and transformers' answers for both."""

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

    def write_push(self, weights: int, policy_version: int) -> WeightManifest:
        tensors = dict(self.models[weights].named_parameters())
        return write_weights(
            self.segments,
            lambda path: save_file(tensors, path),
            policy_version=policy_version,
            update=policy_version,
        )

    def logprobs(self, weights: int, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
        """Full-vocabulary log-probabilities [T, V] before each response token."""
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
    """Knows the versions that were pushed into it."""

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
        manifest = self.student.write_push(weights, next(_VERSIONS))
        self.call("update_weights", manifest)
        self.version, self.weights = manifest.policy_version, weights


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Student]:
    """One whose vocabulary head is its embedding, and one with a head of its own."""
    return {
        "tied": Student(tmp_path_factory.mktemp("tied"), tied=True),
        "untied": Student(tmp_path_factory.mktemp("untied"), tied=False),
    }


@pytest.fixture(scope="session")
def student(students: dict[str, Student]) -> Student:
    return students["tied"]


@pytest.fixture(scope="session")
def generators() -> Iterator[dict[str, GeneratorHost]]:
    hosts: dict[str, GeneratorHost] = {}
    yield hosts
    for host in hosts.values():
        host.close()


@pytest.fixture(params=GENERATORS)
def generator(
    request: pytest.FixtureRequest, students: dict[str, Student], generators: dict[str, GeneratorHost]
) -> GeneratorHost:
    """One engine per kind for all tests; a new one after a test that has ended it."""
    kind = request.param
    if kind not in generators or not generators[kind].process.is_alive():
        generators[kind] = GeneratorHost(kind, students)
        assert generators[kind].call("policy_version") == 0
    return generators[kind]


@pytest.fixture(scope="session", params=TEACHERS)
def teacher(request: pytest.FixtureRequest, student: Student) -> Iterator[EngineHost]:
    class_path, settings = TEACHERS[request.param]
    host = EngineHost(class_path, str(student.folder), settings, max_model_tokens=MAX_MODEL_TOKENS)
    yield host
    host.close()


def _prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of lengths around the engine's block size, the shortest a single token."""
    generator = random.Random(seed)
    lengths = itertools.cycle((1, 7, 31, 32, 33, 70))
    return [[generator.randrange(10, VOCABULARY) for _ in range(next(lengths))] for _ in range(count)]


def _requests(count: int, max_new_tokens: int, seed: int = 0) -> list[SampleRequest]:
    return [
        SampleRequest(prompt_tokens=prompt, max_new_tokens=max_new_tokens, seed=1000 * seed + number)
        for number, prompt in enumerate(_prompts(count))
    ]


def _check_shape(completion: Completion, request: SampleRequest) -> None:
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


def test_responses_end_with_the_stop_token_or_at_the_limit(generator: GeneratorHost) -> None:
    requests = [
        dataclasses.replace(request, max_new_tokens=1 + number % 96)
        for number, request in enumerate(_requests(96, 1))
    ]
    completions = generator.call("generate", requests)
    for completion, request in zip(completions, requests, strict=True):
        _check_shape(completion, request)
        assert completion.policy_versions == [(0, generator.version)]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


def test_logprobs_are_those_of_the_policy_itself(generator: GeneratorHost) -> None:
    """At temperature 1 over the whole vocabulary, whatever the checkpoint's defaults say."""
    requests = _requests(12, 48)
    for completion, request in zip(generator.call("generate", requests), requests, strict=True):
        expected = generator.student.sampled_logprobs(
            generator.weights, request.prompt_tokens, completion.response_tokens
        )
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=TOLERANCE)


def test_samples_have_the_policy_s_frequencies(generator: GeneratorHost) -> None:
    prompt = _prompts(3)[1]
    requests = [SampleRequest(prompt_tokens=prompt, max_new_tokens=1, seed=seed) for seed in range(1500)]
    tokens = [completion.response_tokens[0] for completion in generator.call("generate", requests)]
    policy = generator.student.logprobs(generator.weights, prompt, [0]).exp()[0].double().numpy()
    counts = np.bincount(tokens, minlength=VOCABULARY)
    # Pearson's statistic over ten groups of equal mass: nine degrees of freedom, p = 1e-5.
    groups = np.minimum((policy.cumsum() * 10).astype(int), 9)
    expected = np.bincount(groups, policy, 10) * len(tokens)
    statistic = ((np.bincount(groups, counts, 10) - expected) ** 2 / expected).sum()
    assert statistic < 39


def test_a_seed_gives_its_response_again_in_any_company(generator: GeneratorHost) -> None:
    requests = _requests(12, 24)
    first = generator.call("generate", requests)
    again = generator.call("generate", requests[:6] + requests[8:])
    assert [c.response_tokens for c in again] == [c.response_tokens for c in first[:6] + first[8:]]
    others = generator.call("generate", _requests(12, 24, seed=1))
    assert sum(a.response_tokens != b.response_tokens for a, b in zip(first, others, strict=True)) >= 10


def test_a_push_is_what_samples_and_an_earlier_one_comes_back(generator: GeneratorHost) -> None:
    prompts = _prompts(8)
    texts = {weights: [generator.student.greedy(weights, p, 12) for p in prompts] for weights in (0, 1)}
    assert texts[0] != texts[1]
    for weights in (1, 0, 1, 0):
        generator.push(weights)
        assert generator.call("policy_version") == generator.version
        assert generator.call("greedy", prompts, 12) == texts[weights]


def test_requests_in_flight_survive_a_push(generator: GeneratorHost) -> None:
    requests = _requests(16, 900)
    for after_s in (0.4, 1.6, 6.4):  # when the first tokens are there depends on the machine
        generator.push(0)
        before = generator.version
        running = generator.submit("generate", requests)
        time.sleep(after_s)
        generator.push(1)
        completions = running.result(timeout=120)
        if two_spans := [c for c in completions if len(c.policy_versions) == 2]:
            break
    assert two_spans
    for completion, request in zip(completions, requests, strict=True):
        _check_shape(completion, request)
        starts = [start for start, _ in completion.policy_versions]
        versions = [version for _, version in completion.policy_versions]
        assert starts[0] == 0
        assert versions in ([before], [before, generator.version], [generator.version])
        old = (
            starts[1] if len(starts) == 2 else 0 if versions != [before] else len(completion.response_tokens)
        )
        got = np.array(completion.logprobs)
        expected = [
            generator.student.sampled_logprobs(weights, request.prompt_tokens, completion.response_tokens)
            for weights in (0, 1)
        ]
        np.testing.assert_allclose(got[:old], expected[0][:old], rtol=0, atol=TOLERANCE)
        if generator.on_push == "recompute":
            np.testing.assert_allclose(got[old:], expected[1][old:], rtol=0, atol=TOLERANCE)
    generator.push(0)


def test_a_corrupted_push_is_refused_and_ends_the_engine(generator: GeneratorHost) -> None:
    manifest = generator.student.write_push(1, next(_VERSIONS))
    content = bytearray(Path(manifest.path).read_bytes())
    content[len(content) // 2] ^= 4
    Path(manifest.path).write_bytes(content)
    running = generator.submit("generate", _requests(16, 900))
    time.sleep(0.2)
    message = rf"checksum=[0-9a-f]{{16}} must be {manifest.checksum} \(xxh3-64\)"
    with pytest.raises(WeightPushError, match=message):
        generator.call("update_weights", manifest)
    with pytest.raises(WeightPushError, match=message):
        running.result(timeout=30)
    with pytest.raises(WeightPushError, match=message):
        generator.call("generate", _requests(1, 4))
    with pytest.raises(WeightPushError, match=message):
        generator.call("policy_version")
    assert generator.descendants() == []
    generator.close()


@pytest.mark.parametrize("generator", ["vllm", "transformers"], indirect=True)
def test_a_push_without_every_parameter_is_refused(generator: GeneratorHost) -> None:
    tensors = dict(generator.student.models[1].named_parameters())
    del tensors["model.layers.1.mlp.up_proj.weight"]
    manifest = write_weights(
        generator.student.segments,
        lambda path: save_file(tensors, path),
        policy_version=next(_VERSIONS),
        update=0,
    )
    name = r"model\.layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(
        WeightPushError, match=rf"parameter {name} must be there|shape of {name}=none must be [(\[]\d+, \d+"
    ):
        generator.call("update_weights", manifest)
    generator.close()


def test_no_process_outlives_a_killed_holder(generator: GeneratorHost) -> None:
    started = generator.descendants()
    running = generator.submit("generate", _requests(16, 900))
    time.sleep(0.2)
    generator.process.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    with pytest.raises(ConnectionError):
        running.result(timeout=10)
    generator.process.join(timeout=10)


def _pairs() -> tuple[list[list[int]], list[list[int]]]:
    prompts = _prompts(14)
    lengths = itertools.cycle((1, 20, 3, 64, 100))
    source = random.Random(5)
    responses = [[source.randrange(VOCABULARY) for _ in range(next(lengths))] for _ in prompts]
    return prompts, responses


def test_states_are_those_before_each_response_token(teacher: EngineHost, student: Student) -> None:
    """Through the head they are transformers' full-vocabulary log-probabilities."""
    prompts, responses = _pairs()
    assert teacher.call("hidden_size") == 64
    states = teacher.call("hidden_states_float32", prompts, responses)
    head = student.models[0].lm_head
    for prompt, response, state in zip(prompts, responses, states, strict=True):
        assert state.shape == (len(response), 64)
        got = head(torch.from_numpy(state)).log_softmax(-1)
        torch.testing.assert_close(got, student.logprobs(0, prompt, response), rtol=0, atol=TOLERANCE)


def test_the_payload_is_the_states_rounded_to_bfloat16(
    teacher: EngineHost, student: Student, record_property: Any
) -> None:
    prompts, responses = _pairs()
    exact = teacher.call("hidden_states_float32", prompts, responses)
    payload = teacher.call("hidden_states", prompts, responses)
    head = student.models[0].lm_head
    worst = 0.0
    for bits, state in zip(payload, exact, strict=True):
        assert bits.dtype == np.uint16
        rounded = (bits.astype(np.uint32) << 16).view(np.float32)
        # Nearest: within half a unit of the eighth bit.
        np.testing.assert_allclose(rounded, state, rtol=2.0**-8, atol=1e-6)
        difference = head(torch.from_numpy(rounded)).log_softmax(-1) - head(
            torch.from_numpy(state)
        ).log_softmax(-1)
        worst = max(worst, float(difference.abs().max()))
    record_property("largest_logprob_error_of_bfloat16_states", worst)
    assert worst < 0.03


@pytest.mark.parametrize("generator", ["vllm"], indirect=True)
def test_a_dead_engine_fails_what_waits_for_it(generator: GeneratorHost) -> None:
    """Also a question, to which vLLM's client would wait for an answer for ever."""
    processes = generator.descendants()
    for process in processes:
        process.suspend()
    waiting = [generator.submit("policy_version"), generator.submit("generate", _requests(2, 8))]
    time.sleep(1.0)
    assert not any(future.done() for future in waiting)
    for process in processes:
        process.kill()
    for future in waiting:
        with pytest.raises(
            EngineDied,
            match=r"^(processes of the )?rollout engine must live; .*; check whether the machine ran out",
        ):
            future.result(timeout=30)
    with pytest.raises(EngineDied):
        generator.call("generate", _requests(1, 4))
    generator.close()


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_ids_beyond_the_common_vocabulary_are_never_sampled(kind: str, students: dict[str, Student]) -> None:
    """And log-probabilities are those of the policy over the rest."""
    class_path, settings, _, checkpoint = GENERATORS[kind]
    student, num_tokens = students[checkpoint], VOCABULARY // 3
    host = EngineHost(
        class_path,
        str(student.folder),
        settings,
        max_model_tokens=MAX_MODEL_TOKENS,
        stop_token_ids=STOP_TOKENS,
        num_tokens=num_tokens,
    )
    requests = _requests(6, 24)
    sampled = 0
    for request, completion in zip(requests, host.call("generate", requests), strict=True):
        assert max(completion.response_tokens) < num_tokens
        rows = student.logprobs(0, request.prompt_tokens, completion.response_tokens)
        expected = rows[:, :num_tokens].log_softmax(-1)
        got = expected.gather(1, torch.tensor(completion.response_tokens)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(completion.logprobs, got, rtol=0, atol=TOLERANCE)
        sampled += len(got)
    assert sampled > 40
    assert max(token for text in host.call("greedy", _prompts(6), 12) for token in text) < num_tokens
    host.close()


def test_a_worker_of_vllm_settles_its_vector_math() -> None:
    """vLLM imports this module in every worker before the model, and its rotary table, is made."""
    code = (
        "from distill.machine.vector_math import settle_vector_math\n"
        "assert settle_vector_math.cache_info().currsize == 0\n"
        "import actors.vllm_engine.weight_transfer\n"
        "assert settle_vector_math.cache_info().currsize == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
