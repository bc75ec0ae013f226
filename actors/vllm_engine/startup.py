"""What generator and teacher share when they start: the environment and the engine arguments of vLLM."""

from __future__ import annotations

import os
from typing import Any, Literal

import psutil

from actors.vllm_engine.processes import OWNER_VARIABLE, identity
from distill.config import RolloutConfig, ScoringConfig
from distill.errors import ConfigError
from distill.machine.hardware import resolve_dtype

WORKER_EXTENSION = "actors.vllm_engine.weight_transfer.WorkerExtension"

STEP_TOKENS = 2048
"""Tokens computed in one step on a CPU. An engine raises it when one sequence is longer."""


def set_environment(num_threads: int, tensor_parallel_size: int) -> None:
    """Set what vLLM and torch read from the environment. Call it before their first import in this process.

    Raises: ConfigError when the machine has fewer cores than ranks.
    """
    os.environ |= {
        # At WARNING, a start on a CPU prints fifteen lines about features that the CPU build lacks by design.
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        # All ranks of an engine are on one node, so none of its sockets need be reachable from others.
        "VLLM_HOST_IP": os.environ.get("VLLM_HOST_IP", "127.0.0.1"),
        "DO_NOT_TRACK": "1",
        OWNER_VARIABLE: identity(psutil.Process()),
        # With one rank, the model runs in the engine core itself (or, for an offline LLM, in this
        # process), which saves a process and a message per step.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(max(1, num_threads // tensor_parallel_size)),
        # Waiting threads sleep instead of spinning. With any other work on the cores (a learner, a
        # second engine), spinning makes a step wait ten times as long for threads that are not running.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        "VLLM_CPU_OMP_THREADS_BIND": _thread_binding(num_threads, tensor_parallel_size),
    }
    # The size is an engine argument in bytes here; this variable accepts only whole GiB.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)


def _thread_binding(num_threads: int, tensor_parallel_size: int) -> str:
    """The cores of each rank as ``0,1|2,3``. The operating system places the threads of a single rank."""
    if tensor_parallel_size == 1:
        return "nobind"
    cores = sorted(os.sched_getaffinity(0))[: max(num_threads, tensor_parallel_size)]
    share = len(cores) // tensor_parallel_size
    if share == 0:
        raise ConfigError(
            "tensor_parallel_size", tensor_parallel_size, f"be <= {len(cores)}, the cores of this machine", "lower it"
        )  # fmt: skip
    ranks = (cores[rank * share : (rank + 1) * share] for rank in range(tensor_parallel_size))
    return "|".join(",".join(map(str, rank)) for rank in ranks)


def current_device() -> Literal["cpu", "cuda"]:
    """The device that vLLM computes on; imports vLLM."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


def stat_loggers(metrics_name: str | None) -> list[Any] | None:
    """What publishes vLLM's own metrics through Ray's; None without a name, and where Ray's part for it is missing.

    The publisher is vLLM's. Its metrics have the label ``model_name``, which is ``metrics_name``.
    """
    if metrics_name is None:
        return None
    from vllm.v1.metrics import ray_wrappers

    # vLLM sets this to None where ray.serve, which it imports for one name, lacks a package.
    can_publish = getattr(ray_wrappers, "ray_metrics", None) is not None
    return [ray_wrappers.RayPrometheusStatLogger] if can_publish else None


def engine_arguments(
    model_dir: str,
    settings: RolloutConfig | ScoringConfig,
    max_model_tokens: int,
    device: Literal["cpu", "cuda"],
    metrics_name: str | None = None,
) -> dict[str, Any]:
    """Engine arguments common to generation and scoring. ``metrics_name``: see :func:`stat_loggers`."""
    on_cpu = device == "cpu"
    return {
        "model": model_dir,
        "dtype": resolve_dtype(settings.dtype, device),
        "max_model_len": max_model_tokens,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        # Ignore the checkpoint's sampling defaults; requests contain their own stop tokens.
        "generation_config": "vllm",
        "enforce_eager": on_cpu,  # compiling takes minutes on a CPU
        # vLLM's default of 128 on a CPU is longer than most prompts, and the members of a group share
        # only whole blocks of their prompt.
        "block_size": 32 if on_cpu else None,
        "kv_cache_memory_bytes": int(settings.kv_cache_gib * (1 << 30)) if on_cpu else None,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "worker_extension_cls": WORKER_EXTENSION,
        "served_model_name": metrics_name,
        # The offline engine asks for this before it takes a publisher. At the level ERROR, nothing is logged.
        "disable_log_stats": stat_loggers(metrics_name) is None,
    }
