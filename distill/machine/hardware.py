"""What this machine can do, determined without torch, for the engines, the learner and the preflight."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Literal

ONE_LOAD_AT_A_TIME = threading.Lock()
"""transformers changes defaults of the whole process while it loads a model, so two loads in two threads
interfere (a tied head came out untied). Actors that share a process acquire this lock."""

_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names in /proc/cpuinfo: x86 writes avx512_bf16 and amx_bf16, aarch64 writes bf16."""


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> frozenset[str]:
    """Read the instruction-set flags of the first processor; empty where the system does not list them."""
    try:
        text = Path(cpuinfo).read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def computes_in_bfloat16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the processor has instructions that multiply bfloat16.

    Without them, bfloat16 is emulated and many times slower than float32.
    """
    return bool(_BFLOAT16_FLAGS & cpu_flags(cpuinfo))


def resolve_dtype(
    setting: Literal["auto", "float32", "bfloat16"], device: Literal["cpu", "cuda"] = "cpu"
) -> Literal["float32", "bfloat16"]:
    """Return the number format of a setting: ``auto`` is bfloat16 where it is computed natively."""
    if setting != "auto":
        return setting
    return "bfloat16" if device == "cuda" or computes_in_bfloat16() else "float32"


def resolve_micro_batch_tokens(setting: int | None, device: str) -> int:
    """Return the tokens of one forward pass that a setting means; ``device``: cpu or cuda.

    A few tokens occupy a CPU fully, and more would exceed its caches. A GPU spends most of a small pass on
    starting kernels.
    """
    if setting is not None:
        return setting
    return 4096 if device == "cuda" else 1024


def usable_cores(cpu_max: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Count the cores this process may use: its affinity, limited by the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(cpu_max).read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
