"""Writes the weights of a push into its file, piece by piece.

Each piece is copied from the parameters (off the device, in the file's number format) into a small buffer,
then hashed and written by a second thread while the next piece is copied. No tensor of the file shares memory
with a parameter, and there is no second copy of the model beside the file.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from distill.weights import HashedFile

WeightSource = Callable[[], Iterable[tuple[str, Tensor]]]
"""Yields names and tensors, the same at every call. It may gather them one by one into one buffer."""

_PIECE_BYTES = 4 << 20
"""It fits the second-level cache, where the hash then finds it, and is large enough for a fast transfer."""

_NUM_BUFFERS = 2

_FORMATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The names of number formats in a safetensors header."""


@torch.no_grad()
def write_tensors(weights: WeightSource, dtype: torch.dtype, file: HashedFile) -> None:
    """Write a safetensors file with ``weights`` in one number format, in the order in which they come.

    The parameters must not change until this returns, and may change afterwards.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights()}
    file.write(_header(shapes, dtype))
    buffers: list[Tensor] = []
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="weight-file") as thread:
        for number, piece in enumerate(_pieces(weights(), shapes, _PIECE_BYTES // dtype.itemsize)):
            if number < _NUM_BUFFERS:
                # Only a copy into pinned memory runs at the full rate of the bus.
                buffers.append(torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=piece.is_cuda))
            else:
                writing.popleft().result()
            filled = buffers[number % _NUM_BUFFERS][: piece.numel() * dtype.itemsize]
            # A piece on a GPU is converted there, because that halves what crosses the bus.
            filled.view(dtype).copy_(piece.to(dtype) if piece.is_cuda else piece)
            writing.append(thread.submit(file.write, filled.numpy()))
        for written in writing:
            written.result()


def _pieces(
    weights: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]], size: int
) -> Iterator[Tensor]:
    """Split each tensor into flat pieces of at most ``size`` numbers."""
    for (name, tensor), (expected, shape) in zip(weights, shapes.items(), strict=True):
        if (name, tensor.shape) != (expected, shape):
            raise ValueError(f"weight {name} {tuple(tensor.shape)}: the header has {expected} {shape}")
        yield from tensor.detach().reshape(-1).split(size)


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Return the length and the JSON text with which a safetensors file begins."""
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _FORMATS[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of their size
    return len(text).to_bytes(8, "little") + text
