"""The rows that the benchmark ``replay`` moves, and what every receiver does with them.

It needs numpy and torch only, because the peers' environments import it too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_TOKENS, NUM_STATES, WIDTH = 64, 256, 576
"""A row has one teacher state per response token, so a response has as many tokens as there are states."""
STATE_BYTES = NUM_STATES * WIDTH * 2
_PAGE_STRIDE = 3
"""Three states are less than a page of memory, so a stride of three states touches every page."""
_COPIES = 3
"""Copies of the payload that the side with the most has at a time: in its sender, its store and its receiver."""
_FILES = ("prompt_tokens", "response_tokens", "teacher_hidden")


def write_rows(folder: Path, num_rows: int) -> None:
    """Write the columns of the rows, each as a file of numpy. States are the bits of random finite bfloat16 numbers."""
    random = np.random.default_rng(0)
    columns = {
        "prompt_tokens": random.integers(0, 49_152, (num_rows, PROMPT_TOKENS), np.int32),
        "response_tokens": random.integers(0, 49_152, (num_rows, NUM_STATES), np.int32),
        # Below 0x7F80 all bits are finite positive numbers.
        "teacher_hidden": random.integers(0, 0x7F80, (num_rows, NUM_STATES, WIDTH), np.uint16),
    }
    for name in _FILES:
        np.save(folder / f"{name}.npy", columns[name])


def read_rows(folder: str | Path) -> dict[str, np.ndarray]:
    """Read the columns into memory of this process, whose pages are touched by it."""
    return {name: np.load(Path(folder) / f"{name}.npy") for name in _FILES}


def to_tensors(columns: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The columns as tensors that share their memory, with the states as bfloat16."""
    import torch

    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    tensors["teacher_hidden"] = tensors["teacher_hidden"].view(torch.bfloat16)
    return tensors


def touch(states: Tensor) -> int:
    """Read from every page of some bfloat16 states [..., 256, 576]; returns a sum that identifies them."""
    import torch

    return int(states.view(torch.int16)[..., ::_PAGE_STRIDE, 0].sum())


def expected_touch(folder: Path, num_rows: int) -> int:
    """What :func:`touch` returns for the states of the first rows together."""
    states = np.load(folder / "teacher_hidden.npy", mmap_mode="r")
    return int(states[:num_rows, ::_PAGE_STRIDE, 0].view(np.int16).sum(dtype=np.int64))


def warm_memory(folder: str | Path, num_rows: int) -> None:
    """Use as much memory as a side needs for a round, and free it.

    A virtual machine can give pages that are free for some seconds back to its host. Getting one again costs several
    times as much as filling it, and would be counted for whichever side needs new pages.
    """
    path = Path(folder) / "warm"
    block = b"1" * STATE_BYTES
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(_COPIES * num_rows):
                file.write(block)
    finally:
        path.unlink(missing_ok=True)


def start_private_ray(object_store_bytes: int) -> None:
    """Start a Ray of this process's own, in a peer's environment."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    # A peer's actors each claim a core, whatever they use, and wait for one that the machine need not have.
    options: dict[str, Any] = {"num_cpus": 16, "include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", object_store_memory=object_store_bytes, **options)
