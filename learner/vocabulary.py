"""Full-vocabulary work in chunks of positions: heads, their logits, losses over them.

Called by ``learner.update``, ``learner.sft`` and the evaluation. A row of logits is V numbers
per position, so rows exist for one chunk at a time and the gradient is formed in the chunk.
Two sizes matter: matrix products want many positions (the *chunk*), elementwise passes on a
CPU want few, so that their temporaries stay in the cache and are not handed back to the
operating system after every pass (the *block*, some rows of a chunk; at V = 49,152 a pass over
fresh rows of 256 positions took 21 ms whole and 2 to 3 ms in blocks).

Legend: N positions, D features, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from distill.config import ConfigError, rule

_BLOCK_BYTES = 2 << 20
"""Bytes of one float32 block on a CPU. A score of such temporaries fit the last-level cache and
the allocator's pool; blocks of tens of MiB go back to the operating system after every pass."""

_PLAIN = (
    "ernie4_5", "exaone4", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "helium", "llama", "ministral",
    "mistral", "mixtral", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
_Rule = tuple[Literal["softcap", "multiply", "divide"], str, float | None]
_KNOWN: dict[str, _Rule | None] = {
    **dict.fromkeys(_PLAIN),
    "cohere": ("multiply", "logit_scale", 0.0625),
    "cohere2": ("multiply", "logit_scale", 0.0625),
    "gemma2": ("softcap", "final_logit_softcapping", 30.0),
    "gemma3_text": ("softcap", "final_logit_softcapping", None),
    "granite": ("divide", "logits_scaling", 1.0),
    "granitemoe": ("divide", "logits_scaling", 1.0),
}
"""What each architecture does after its head: kind, key of its config, the key's default.
Read from the modelling code of transformers; what is not here is refused, never guessed."""


def known_architectures() -> list[str]:
    """The model types whose logits are known to be a transform of head and state."""
    return sorted(_KNOWN)


_HEAD_NAMES = ("lm_head", "embed_out")
_EMBEDDING_NAMES = (
    "model.embed_tokens.weight", "model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight",
    "transformer.wte.weight", "wte.weight", "gpt_neox.embed_in.weight",
    "transformer.word_embeddings.weight", "word_embeddings.weight",
)  # fmt: skip


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between ``hidden @ weight.T`` and its logits."""

    scale: float = 1.0
    """Factor of the biased product (Cohere; Granite's divisor inverted)."""
    softcap: float | None = None
    """c of c · tanh(logits / c) (Gemma 2)."""
    bias: Tensor | None = None
    """[V]: the head's bias."""

    def __call__(self, product: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Logits in float32 from the product of states and head."""
        logits = product.float() if product.dtype in (torch.bfloat16, torch.float16) else product
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def prefix(self, num_tokens: int) -> LogitTransform:
        """The transform of the first ``num_tokens`` tokens."""
        return self if self.bias is None else replace(self, bias=self.bias[:num_tokens])

    @classmethod
    def from_config(cls, config: Any, bias: Tensor | None = None) -> LogitTransform:
        """``config``: a Hugging Face config, or its ``config.json`` as a mapping.

        Raises: ConfigError when the architecture is not one whose logits are known.
        """
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        model_type = values.get("model_type")
        if model_type not in _KNOWN:
            message = rule(
                "model_type", model_type, f"be one of {', '.join(known_architectures())}",
                "its logits are not known to be head(state); choose another model, or read its modelling"
                " code and add it to learner/vocabulary.py",
            )  # fmt: skip
            raise ConfigError(message)
        known = _KNOWN[model_type]
        if known is None:
            return cls(bias=bias)
        kind, key, default = known
        value = values.get(key, default)
        if kind == "softcap":
            return cls(softcap=None if value is None else float(value), bias=bias)
        if not value:
            raise ConfigError(
                rule(f"{model_type}.{key}", value, "be a number other than 0", "repair config.json")
            )
        return cls(scale=float(value) if kind == "multiply" else 1.0 / float(value), bias=bias)


@dataclass(frozen=True)
class Head:
    """An unembedding that is not trained: the teacher's, or a detached view of the student's."""

    weight: Float[Tensor, "V D"]
    transform: LogitTransform

    @property
    def num_tokens(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @cached_property
    def row_norms(self) -> Float[Tensor, " V"]:
        """Norm of each row, kept so that no normalised copy of the head is."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.linalg.vector_norm(self.weight, dim=1, dtype=wide).clamp_min(1e-12)

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Float32 logits of some states, all at once."""
        return self.transform(hidden.to(self.weight.dtype) @ self.weight.T)

    def prefix(self, num_tokens: int) -> Head:
        """The head of the first ``num_tokens`` tokens.

        Models of one tokenizer may pad their vocabularies to different sizes; both policies
        are then distributions over the common prefix, and the tails have no probability.
        """
        if num_tokens == self.num_tokens:
            return self
        return Head(self.weight[:num_tokens], self.transform.prefix(num_tokens))

    @classmethod
    def from_checkpoint(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Head:
        """Read the head alone from a Hugging Face checkpoint of safetensors.

        Raises: ConfigError when the architecture is unknown or the tensor is not there.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        transform = LogitTransform.from_config(config)
        files = _tensor_files(folder)
        head = next((name for name in _HEAD_NAMES if f"{name}.weight" in files), None)
        tied = config.get("tie_word_embeddings", head is None)
        weight_name = None if head is None else f"{head}.weight"
        if tied:
            embedding = next((name for name in _EMBEDDING_NAMES if name in files), None)
            weight_name = embedding or weight_name
        if weight_name is None:
            message = rule("checkpoint", folder, f"hold {' or '.join(_HEAD_NAMES)}, or a known embedding",
                           "save it again with save_pretrained")  # fmt: skip
            raise ConfigError(message)
        weight = _read_tensor(files, weight_name).to(device, dtype)
        bias_name = next((f"{name}.bias" for name in _HEAD_NAMES if f"{name}.bias" in files), None)
        bias = None if bias_name is None else _read_tensor(files, bias_name).to(device, torch.float32)
        return cls(weight, replace(transform, bias=bias))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise ConfigError(rule("checkpoint", folder, "hold model.safetensors or its index",
                               "convert it with save_pretrained; pickled weights are not read"))  # fmt: skip
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _read_tensor(files: Mapping[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        return tensors.get_tensor(name)


class ChunkedLogits:
    """Logits of a fixed head at N states, formed a chunk at a time when a row of it is asked for.

    Ask with the slices that :func:`chunked_loss` or :func:`chunked_blocks` of the same chunk give,
    in order; the answer may be a view of a buffer that the next chunk overwrites.
    """

    def __init__(self, head: Head, hidden: Float[Tensor, "N D"], chunk: int) -> None:
        self._head = head
        self._hidden = hidden.detach().to(head.weight.dtype)
        self._chunk = chunk
        self._buffer: Tensor | None = None
        self._start = -1

    @torch.no_grad()
    def __call__(self, where: slice) -> Float[Tensor, "n V"]:
        start = where.start // self._chunk * self._chunk
        if where.stop > start + self._chunk:
            raise ValueError(f"rows {where.start}:{where.stop} straddle chunks of {self._chunk}")
        if self._buffer is None:
            self._buffer = self._hidden.new_empty(min(self._chunk, len(self._hidden)), self._head.num_tokens)
        if start != self._start:
            rows = self._hidden[start : start + self._chunk]
            torch.mm(rows, self._head.weight.T, out=self._buffer[: len(rows)])
            self._start = start
        return self._head.transform(self._buffer[where.start - start : where.stop - start])


def blocks(
    start: int, stop: int, num_tokens: int, device: torch.device, boundary: int = 0
) -> Iterator[slice]:
    """Cut the rows of a chunk into blocks of about equal size; one block on a GPU.

    No block holds positions from both sides of ``boundary``.
    """
    if start < boundary < stop:
        yield from blocks(start, boundary, num_tokens, device)
        start = boundary
    rows = stop - start
    most = rows if device.type != "cpu" else max(1, _BLOCK_BYTES // (4 * num_tokens))
    count = -(-rows // most)
    for number in range(count):
        yield slice(start + rows * number // count, start + rows * (number + 1) // count)


def chunked_blocks(num_rows: int, num_tokens: int, chunk: int, device: torch.device) -> Iterator[slice]:
    """The blocks of all chunks, in order: how :func:`chunked_loss` walks the positions."""
    for start in range(0, num_rows, chunk):
        yield from blocks(start, min(start + chunk, num_rows), num_tokens, device)


LossOfChunk = Callable[[slice, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(positions, their logits [n, V]) -> (their share of the loss, metrics to be summed)."""


def chunked_loss(
    hidden: Float[Tensor, "N D"],
    head_weight: Float[Tensor, "V D"],
    transform: LogitTransform,
    loss_of_chunk: LossOfChunk,
    chunk: int,
    *,
    num_tokens: int | None = None,
    parameters: Sequence[Tensor] = (),
    boundary: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of ``loss_of_chunk`` over the positions, differentiable, without [N, V] tensors.

    The gradient with respect to each block's logits is taken at once, by autograd, and carried
    to ``hidden`` and ``head_weight`` by two matrix products; backward only scales what is there.
    The product computes in ``hidden``'s format, the loss and the head's gradient in float32.

    ``num_tokens``: only the first so many rows of the head (a common vocabulary prefix).
    ``parameters``: further tensors that the loss depends on and that shall have gradients; the
    transform's bias is added by itself. ``boundary``: no call of ``loss_of_chunk`` gets positions
    from both sides of it.

    Returns the loss, and the metrics summed and detached. Can be backpropagated once.
    """
    num_tokens = num_tokens or head_weight.shape[0]
    transform = transform.prefix(num_tokens)
    if transform.bias is not None and transform.bias.requires_grad:
        parameters = (*parameters, transform.bias)
    metrics: dict[str, Tensor] = {}
    with_gradients = torch.is_grad_enabled()
    plan = _Plan(transform, loss_of_chunk, chunk, num_tokens, boundary, with_gradients, metrics)
    loss = _ChunkedLoss.apply(plan, hidden, head_weight, *parameters)
    return loss, metrics


@dataclass(frozen=True)
class _Plan:
    transform: LogitTransform
    loss_of_chunk: LossOfChunk
    chunk: int
    num_tokens: int
    boundary: int
    with_gradients: bool
    metrics: dict[str, Tensor]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, head_weight: Tensor, *parameters: Tensor) -> Tensor:
        _, for_hidden, for_head, *for_parameters = ctx.needs_input_grad
        weight = head_weight[: plan.num_tokens].to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = [tensor for tensor, need in zip(parameters, for_parameters, strict=True) if need]
        with_gradients = plan.with_gradients and (for_hidden or for_head or bool(wanted))
        hidden_grad = torch.zeros_like(hidden) if with_gradients and for_hidden else None
        head_grad = torch.zeros_like(head_weight, dtype=wide) if with_gradients and for_head else None
        grads = [torch.zeros_like(tensor) for tensor in wanted] if with_gradients else []
        total = hidden.new_zeros((), dtype=wide)
        buffer = hidden.new_empty(min(plan.chunk, len(hidden)), plan.num_tokens)
        for start in range(0, len(hidden), plan.chunk):
            stop = min(start + plan.chunk, len(hidden))
            product = torch.mm(hidden[start:stop], weight.T, out=buffer[: stop - start])
            for where in blocks(start, stop, plan.num_tokens, hidden.device, plan.boundary):
                rows = product[where.start - start : where.stop - start]
                total += _block_loss(plan, where, rows, wanted, grads, with_gradients)
            if hidden_grad is not None:
                torch.mm(product, weight, out=hidden_grad[start:stop])
            if head_grad is not None:
                _add_product(head_grad[: plan.num_tokens], product.T, hidden[start:stop])
        all_grads = iter(grads)
        ctx.grads = [hidden_grad, head_grad]
        ctx.grads += [next(all_grads, None) if need else None for need in for_parameters]
        ctx.head_dtype = head_weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if ctx.grads is None:
            raise RuntimeError("a chunked loss can be backpropagated once: its gradients were handed out")
        grads, ctx.grads = ctx.grads, None
        for grad in grads:
            if grad is not None:
                grad.mul_(grad_outputs[0])
        if grads[1] is not None:
            grads[1] = grads[1].to(ctx.head_dtype)
        return (None, *grads)


def _block_loss(
    plan: _Plan, where: slice, rows: Tensor, wanted: list[Tensor], grads: list[Tensor], with_gradients: bool
) -> Tensor:
    """Loss of one block; overwrites its rows of the product by the gradient in them."""
    with torch.set_grad_enabled(with_gradients):
        leaf = rows.detach().requires_grad_(with_gradients)
        loss, metrics = plan.loss_of_chunk(where, plan.transform(leaf))
        for name, value in metrics.items():
            value = value.detach()
            plan.metrics[name] = plan.metrics[name] + value if name in plan.metrics else value
        if not with_gradients:
            return loss.detach()
        if not loss.requires_grad:
            rows.zero_()
            return loss
        row_grad, *others = torch.autograd.grad(loss, [leaf, *wanted], allow_unused=True)
    if row_grad is None:
        rows.zero_()
    else:
        rows.copy_(row_grad)
    for grad, other in zip(grads, others, strict=True):
        if other is not None:
            grad += other
    return loss.detach()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a temporary where the formats allow it."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
