"""Plain transformers behind the protocols Generator and Teacher.

It serves machines without vLLM and tiny models, and the tests of the vLLM engines compare with it.

One thread does the model's work, so the event loop stays free. A push is loaded between two decoding steps:
requests in flight continue under the new weights, as with vLLM.

Shapes: B sequences of a batch, T response tokens, V vocabulary, D features.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from actors.step_loop import StepLoop
from actors.stepped_teacher import SteppedTeacher, text_tokens
from distill.config import RolloutConfig, ScoringConfig
from distill.errors import NO_VALUE, first_line
from distill.interfaces import Completion, SampleRequest, Tokens, WeightManifest, WeightPushError
from distill.machine.hardware import ONE_LOAD_AT_A_TIME, resolve_dtype, usable_cores
from distill.machine.vector_math import settle_vector_math
from distill.weights import StalePush, loading, require_newer


@dataclass
class _Sequence:
    """A request while it is sampled."""

    tokens: list[int]
    num_prompt_tokens: int
    max_new_tokens: int
    generator: torch.Generator | None
    """None: decode greedily."""
    logprobs: list[float] = field(default_factory=list)
    policy_versions: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def response_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]


class TransformersGenerator:
    """Batched sampling with a key-value cache; built by :meth:`start`.

    Except for the rounding of batched arithmetic, a seeded response depends only on its seed and prompt. A push
    that fails leaves the weights in an unknown state, so all later calls raise its WeightPushError.
    """

    def __init__(
        self,
        model: Any,
        thread: ThreadPoolExecutor,
        *,
        stop_token_ids: Sequence[int],
        on_push: Literal["recompute", "keep_kv"],
        max_num_seqs: int,
        num_tokens: int | None,
    ) -> None:
        self._num_tokens = num_tokens
        self._model: Any = model
        self._thread = thread
        self._stop_token_ids = frozenset(stop_token_ids)
        self._on_push = on_push
        self._max_num_seqs = max_num_seqs
        self._version = 0
        self.num_finished = 0
        self._pushes: list[tuple[WeightManifest, asyncio.Future[None]]] = []
        self._failure: WeightPushError | None = None
        # Not torch's own, which other threads of the process use, and which starts equal in every process.
        self._unseeded = torch.Generator()
        self._unseeded.seed()

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
    ) -> TransformersGenerator:
        """Load a checkpoint; returns when the engine can sample.

        ``num_tokens``: as in ``VllmGenerator.start``. ``max_model_tokens`` is not used, because the cache
        grows with the text.
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="transformers-generator")
        load = partial(_load, AutoModelForCausalLM, model_dir, settings)
        model = await asyncio.get_running_loop().run_in_executor(thread, load)
        return cls(
            model,
            thread,
            stop_token_ids=stop_token_ids,
            on_push=on_push,
            max_num_seqs=settings.max_num_seqs,
            num_tokens=num_tokens,
        )

    async def generate(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        """Sample all requests; returns completions in the order of the requests.

        Raises: WeightPushError, also when the push failed before the call.
        """
        sequences = [
            _Sequence(
                tokens=_list(request.prompt_tokens),
                num_prompt_tokens=len(request.prompt_tokens),
                max_new_tokens=request.max_new_tokens,
                generator=self._unseeded
                if request.seed is None
                else torch.Generator().manual_seed(request.seed & (2**63 - 1)),
            )
            for request in requests
        ]
        await self._in_thread(lambda: self._decode_all(sequences))
        return [_completion(sequence) for sequence in sequences]

    async def greedy(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuation of each prompt, stop token included."""
        sequences = [_Sequence(_list(prompt), len(prompt), max_new_tokens, None) for prompt in prompts]
        await self._in_thread(lambda: self._decode_all(sequences))
        return [sequence.response_tokens for sequence in sequences]

    async def update_weights(self, manifest: WeightManifest) -> None:
        """Load a push between two decoding steps.

        Raises: WeightPushError, and later calls raise it too; StalePush, after which the engine stays usable.
        """
        self._check_usable()
        done = asyncio.get_running_loop().create_future()
        self._pushes.append((manifest, done))
        # The thread loads it from a running decoding loop, or in this call after it.
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load_pushes)
        await done

    async def policy_version(self) -> int:
        """Return the policy version that samples now; 0 before the first push."""
        self._check_usable()
        return self._version

    async def close(self) -> None:
        """Free the model; there are no other processes to end."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        self._model = None

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise WeightPushError(*self._failure.args) from self._failure

    async def _in_thread(self, work: Callable[[], None]) -> None:
        self._check_usable()
        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _load_pushes(self) -> None:
        while self._pushes:
            manifest, done = self._pushes.pop(0)
            try:
                require_newer(manifest.policy_version, self._version)
                _load_push(self._model, manifest)
                self._version = manifest.policy_version
            except StalePush as stale:
                done.get_loop().call_soon_threadsafe(done.set_exception, stale)
            except Exception as error:
                self._failure = WeightPushError(
                    f"push of policy version {manifest.policy_version}",
                    NO_VALUE,
                    f"be loaded ({first_line(error)})",
                )
                done.get_loop().call_soon_threadsafe(done.set_exception, self._failure)
            else:
                done.get_loop().call_soon_threadsafe(done.set_result, None)

    def _decode_all(self, sequences: Sequence[_Sequence]) -> None:
        for first in range(0, len(sequences), self._max_num_seqs):
            self._decode(list(sequences[first : first + self._max_num_seqs]))

    @torch.inference_mode()
    def _decode(self, batch: list[_Sequence]) -> None:
        """Sample until every sequence of the batch has ended."""
        cache: DynamicCache | None = None
        version = self._version
        width = max(len(sequence.tokens) for sequence in batch)
        while batch:
            self._load_pushes()
            self._check_usable()
            if version != self._version and self._on_push == "recompute":
                cache = None
            version = self._version
            logits, cache = self._forward(batch, width, cache)
            _append_tokens(batch, logits, version, self._stop_token_ids)
            width += 1
            unfinished = [index for index, sequence in enumerate(batch) if sequence.finish_reason is None]
            self.num_finished += len(batch) - len(unfinished)
            if len(unfinished) < len(batch):
                cache.batch_select_indices(torch.tensor(unfinished, dtype=torch.long))
                batch = [batch[index] for index in unfinished]

    def _forward(
        self, batch: list[_Sequence], width: int, cache: DynamicCache | None
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Compute logits [B, V] of the next token, V being the common vocabulary.

        Without a cache it feeds all tokens, left-padded to ``width``; with one, only the last token.
        """
        starts = torch.tensor([[width - len(sequence.tokens)] for sequence in batch])
        mask = (torch.arange(width) >= starts).long()
        if cache is None:
            padded = [[0] * (width - len(sequence.tokens)) + sequence.tokens for sequence in batch]
            tokens = torch.tensor(padded)
        else:
            tokens = torch.tensor([sequence.tokens[-1:] for sequence in batch])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        first = 0 if cache is None else width - 1
        cache = DynamicCache() if cache is None else cache
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions[:, first:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1, : self._num_tokens].float(), cache


def _append_tokens(
    batch: Sequence[_Sequence], logits: torch.Tensor, version: int, stop_token_ids: frozenset[int]
) -> None:
    """Sample one token of each sequence from logits [B, V] and record what its completion contains."""
    logprobs = logits.log_softmax(-1)
    noise = torch.ones_like(logprobs)
    for row, sequence in zip(noise, batch, strict=True):
        if sequence.generator is not None:
            # argmax of p / e with e exponential is a sample of p; with e = 1 it is greedy.
            row.exponential_(generator=sequence.generator)
    tokens = (logprobs - noise.log_()).argmax(-1, keepdim=True)
    found = zip(batch, tokens[:, 0].tolist(), logprobs.gather(-1, tokens)[:, 0].tolist(), strict=True)
    for sequence, token, logprob in found:
        if not sequence.policy_versions or sequence.policy_versions[-1][1] != version:
            sequence.policy_versions.append((len(sequence.logprobs), version))
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        if token in stop_token_ids:
            sequence.finish_reason = "stop"
        elif len(sequence.logprobs) == sequence.max_new_tokens:
            sequence.finish_reason = "length"


def _completion(sequence: _Sequence) -> Completion:
    assert sequence.finish_reason is not None
    return Completion(
        response_tokens=sequence.response_tokens,
        logprobs=sequence.logprobs,
        policy_versions=sequence.policy_versions,
        finish_reason=sequence.finish_reason,
    )


@torch.no_grad()
def _load_push(model: Any, manifest: WeightManifest) -> None:
    """Check a push, then copy it into the model's parameters.

    Raises: WeightPushError when the file differs from its manifest or does not contain the whole model.
    """
    with loading(manifest), safe_open(manifest.path, framework="pt") as file:
        names = set(file.keys())
        for name, parameter in model.named_parameters():
            if name not in names:
                raise WeightPushError(f"{manifest.path}: parameter {name}", NO_VALUE, "be there")
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise WeightPushError(
                    f"{manifest.path}: shape of {name}", tuple(tensor.shape), f"be {tuple(parameter.shape)}"
                )
            parameter.copy_(tensor)


class TransformersTeacher(SteppedTeacher):
    """Scores with the model's body, without its head; built by :meth:`start`."""

    @classmethod
    async def start(
        cls, model_dir: str, settings: ScoringConfig, *, max_model_tokens: int
    ) -> TransformersTeacher:
        """Load the teacher; returns when it can score. ``max_model_tokens`` is not used."""
        loop = StepLoop("teacher engine")
        await loop.start(lambda: _Body(_load(AutoModel, model_dir, settings)))
        return cls(loop)


class _Body:
    """A model's body as :class:`actors.step_loop.SteppedEngine`. A step is the forward pass of one text.

    In a batch, the last bits of a state would depend on the other texts, and a resumed run does not batch the
    same corpus rows together as the run it continues.
    """

    def __init__(self, model: Any) -> None:
        self._model: Any = model
        self._waiting: dict[str, tuple[Tokens, Tokens]] = {}

    def add(self, request_id: str, prompt: Tokens, response: Tokens) -> None:
        """Accept a text."""
        self._waiting[request_id] = (prompt, response)

    @torch.inference_mode()
    def step(self) -> list[tuple[str, torch.Tensor | Exception]]:
        """Compute the text that has waited longest."""
        request_id = next(iter(self._waiting))
        prompt, response = self._waiting.pop(request_id)
        try:
            tokens = torch.from_numpy(text_tokens(prompt, response))[None]
            hidden = self._model(input_ids=tokens, use_cache=False).last_hidden_state
        except Exception as error:
            return [(request_id, error)]
        return [(request_id, hidden[0, len(prompt) - 1 :])]

    def abort(self, request_ids: list[str]) -> None:
        """Drop texts that have not been computed."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def close(self) -> None:
        """Free the model; there are no other processes to end."""
        self._model = None


def _list(tokens: Tokens) -> list[int]:
    """Return a new list of Python integers."""
    return tokens.tolist() if isinstance(tokens, np.ndarray) else list(tokens)


def _load(auto_class: Any, model_dir: str, settings: RolloutConfig | ScoringConfig) -> Any:
    torch.set_num_threads(settings.num_threads or usable_cores())
    settle_vector_math()
    dtype = getattr(torch, resolve_dtype(settings.dtype))
    with ONE_LOAD_AT_A_TIME:
        return auto_class.from_pretrained(model_dir, dtype=dtype).eval().requires_grad_(False)
