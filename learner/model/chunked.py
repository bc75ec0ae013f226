"""Full-vocabulary work in chunks of positions: logits of a head, and losses over them.

Called by :mod:`learner.update`, :mod:`learner.sft` and the evaluation. A row of logits is V numbers
per position, so rows exist for one chunk at a time, and the gradient is formed within the chunk.
Matrix products are efficient over many positions, so one product covers a whole *chunk*. On a CPU,
elementwise passes are efficient over few positions, because their temporaries then stay in the cache and
are not returned to the operating system after every pass. These passes therefore cover one *block* at a
time, which is some rows of a chunk. At V = 49,152 a pass over fresh rows of 256 positions took 21 ms as a
whole and 2 to 3 ms in blocks.

Legend: N positions, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from learner.model.head import Head, LogitTransform

_BLOCK_BYTES = 2 << 20
"""Bytes of one float32 block on a CPU. About twenty such temporaries fit the last-level cache and the
allocator's pool; blocks of tens of MiB return to the operating system after every pass."""


class ChunkedLogits:
    """Logits of a fixed head at N states, computed a chunk at a time on the first access to its rows.

    Call it with the slices of :func:`chunked_loss` or :func:`chunked_blocks` for the same chunk size, in
    order. The result may be a view of a buffer that the next chunk overwrites.
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

    No block contains positions from both sides of ``boundary``.
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
    """The blocks of all chunks in the order in which :func:`chunked_loss` visits them."""
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

    The forward pass takes the gradient in each block's logits by autograd and carries it to ``hidden`` and
    ``head_weight`` by two matrix products; the backward pass only scales these gradients. The products
    are computed in ``hidden``'s format, the loss and the head's gradient in float32.

    ``num_tokens``: number of rows of the head that are used, a common vocabulary prefix.
    ``parameters``: further tensors whose gradients are needed; the transform's bias is added
    automatically. ``boundary``: no call of ``loss_of_chunk`` gets positions from both sides of it.

    Returns the loss, and the metrics summed and detached. The loss can be backpropagated once.
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
            raise RuntimeError(
                "a chunked loss can be backpropagated only once: its gradients have been handed out"
            )
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
    """Loss of one block; overwrites its rows of the product with their gradient."""
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
