"""Settles which of oneMKL's vector functions this process uses, before two threads call one at once.

PyTorch's CPU build passes ``exp``, ``log``, ``sqrt``, ``sin`` and similar functions of contiguous tensors to
oneMKL, a piece per thread. MKL chooses a kernel for the processor at the first call of each function. In the
version that PyTorch's wheels contain (2024.2), two threads that make this first call together can get a
kernel of low accuracy for that call: errors of a thousand ulp in the piece of one thread. This was seen on
busy machines with AVX-512, in 216 of 4,160 processes (pytorch/pytorch#188792) and in 13 of 40
(pytorch/helion#3598). A training run then produces different numbers from the same seed, and an engine that
computes its rotary table with such a call keeps the errors for as long as it lives. oneMKL 2025 does not
have the defect.

One thread makes a call on one element, which settles the choice for the process. All later results of MKL
are the usual ones, bit for bit.
"""

from __future__ import annotations

import functools

import torch

FUNCTIONS = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp",
    "log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip
"""PyTorch's functions that call MKL's, each in two precisions (found with breakpoints on ``vms*`` and ``vmd*``)."""


@functools.cache
def settle_vector_math() -> None:
    """Call each function on one element. Code that loads a model to compute with it calls this first."""
    for dtype in (torch.float32, torch.float64):
        element = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(element)
