"""Teacher states as bfloat16 bits: the one conversion between torch tensors and the rows of the schema.

Arrow has no bfloat16, so a row contains the 16 bits of each number as uint16 (:mod:`distill.schema`, which
does without torch).
"""

from __future__ import annotations

import numpy as np
import torch


def to_bits(states: torch.Tensor) -> np.ndarray:
    """Round a floating-point CPU tensor [...] to bfloat16; returns the bits, a uint16 array [...].

    Rounds to nearest, ties to even. A bfloat16 tensor is not copied: the array shares its memory.
    """
    return states.to(torch.bfloat16).view(torch.uint16).numpy()


def from_bits(bits: np.ndarray) -> torch.Tensor:
    """The bfloat16 tensor [...] of a writable uint16 array [...]; shares the array's memory."""
    return torch.from_numpy(bits).view(torch.bfloat16)
