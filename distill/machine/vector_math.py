"""Settle which of oneMKL's vector functions this process uses, before two threads ask at once.

PyTorch's CPU build hands ``exp``, ``log``, ``sqrt``, ``sin`` and the like of contiguous tensors to oneMKL,
a piece per thread. MKL chooses a kernel for the processor at the first call of each function, and in the
version that PyTorch's wheels hold (2024.2) two threads that make that first call together can get one of low
accuracy, for that call alone: errors of a thousand ulp in one thread's piece. Seen on busy machines with
AVX-512, in 216 of 4,160 processes (pytorch/pytorch#188792) and in 13 of 40 (pytorch/helion#3598). A
training run then gives other numbers from the same seed; an engine that computes its rotary table with
such a call keeps the errors for as long as it lives. Gone in oneMKL 2025.

A call on one element is made by one thread, and settles the choice for the process. The numbers that MKL
gives afterwards are the usual ones, bit for bit.
"""

from __future__ import annotations

import functools

import torch

FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp",
    "log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
"""PyTorch's functions that call MKL's, each in two precisions (seen by breakpoints on ``vms*`` and ``vmd*``)."""


@functools.cache
def settle_vector_math() -> None:
    """Call each function on one element. Whoever loads a model to compute with it calls this first."""
    for dtype in (torch.float32, torch.float64):
        element = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(element)
