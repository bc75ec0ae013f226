"""Attention over packed sequences: each sequence attends only to itself.

Registered with transformers under :data:`PACKED`. The library's own ``sdpa`` builds a block-diagonal mask
for a pack and computes all of it, so attention over a pack of 20 sequences costs 20 times too much.
Here each sequence is a separate causal call, for which the kernels without a mask can be used. On a GPU
in half precision, where the number of calls dominates the time, one call of PyTorch's variable-length
flash attention computes them all.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "packed_sdpa"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence.

    ``query``, ``key``, ``value``: [1, heads, L, d], the sequences one after another;
    ``sequence_lengths``: their lengths, which add up to L. Returns [1, L, heads, d].
    """
    window = sliding_window or getattr(module, "sliding_window", None)  # Qwen2-MoE passes none
    if _takes_flash(query):
        return _all_at_once(query, key, value, sequence_lengths, scaling, window), None
    outputs = []
    parts = (tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        mask = None
        if window and q.shape[2] > window:  # some configs write 0 for no window
            mask = _window(q.shape[2], window, q.device)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=mask is None)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


_HALF = (torch.bfloat16, torch.float16)


def _takes_flash(query: Tensor) -> bool:
    """Whether flash attention computes it: on a GPU, in half precision, possibly by autocast.

    Rotated queries are float32 before autocast converts them.
    """
    size = query.shape[-1]
    return query.is_cuda and _dtype_on_gpu(query) in _HALF and size <= 256 and size % 8 == 0


def _dtype_on_gpu(query: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype


def _all_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequence_lengths: tuple[int, ...],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor((0, *itertools.accumulate(sequence_lengths)), dtype=torch.int32)
    ends = ends.to(query.device, non_blocking=True)
    longest = max(sequence_lengths)
    dtype = _dtype_on_gpu(query)
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    shared = q.shape[1] // k.shape[1]  # query heads per key head; repeated as in the path of sdpa
    output = varlen_attn(
        q.contiguous(), k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1),
        ends, ends, longest, longest,
        scale=scaling, window_size=(window - 1 if window else -1, 0),
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output[None]


def _window(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, length, length] bool: each position sees itself and the ``window - 1`` before it."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask is needed: the sequences' lengths determine what each token sees."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
