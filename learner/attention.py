"""Attention over packed sequences, one sequence at a time.

Registered with transformers under :data:`PACKED`. Its own ``sdpa`` given a pack builds a
block-diagonal mask and computes the whole square of it: attention over a pack of 20 sequences
costs 20 times what it must. Here each sequence is a causal call of its own, which also takes the
kernels that want no mask.
"""

from __future__ import annotations

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
    """Causal attention of each sequence to itself.

    ``query``, ``key``, ``value``: [1, heads, L, d], the sequences one after another;
    ``sequence_lengths``: their lengths, which add up to L. Returns [1, L, heads, d].
    """
    window = sliding_window or getattr(module, "sliding_window", None)  # Qwen2-MoE passes none
    outputs = []
    parts = (tensor.split(sequence_lengths, dim=2) for tensor in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        mask = None
        if window and q.shape[2] > window:  # some configs say 0 for none
            mask = _window(q.shape[2], window, q.device)
        output, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, is_causal=mask is None)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _window(length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, length, length] bool: each position sees itself and the ``window - 1`` before it."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return ((distance >= 0) & (distance < window))[None, None]


def _no_mask(*_: Any, **__: Any) -> None:
    """What a sequence may see follows from its length."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)
