"""What runs inside vLLM's worker processes: our weight-transfer engine, and a watchdog.

Named as ``worker_extension_cls="actors.weight_transfer.WorkerExtension"``, so vLLM imports
this module in every worker before the model is loaded. That works from a working directory
without installation. Importing it

- registers the ``shared_memory`` backend: a push is a safetensors file in shared memory,
  checked against its size and checksum before the model is touched, then loaded by vLLM's
  own layerwise reload (the CPU build repacks weights, so they cannot be copied in place);
- starts a watchdog when the process was started by an engine of ours: a worker outlives a
  killed holder otherwise, and keeps the device full;
- settles MKL's vector functions, before the model's rotary table is computed with them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from distill.interfaces import WeightManifest, WeightPushError
from distill.machine.vector_math import settle_vector_math
from distill.weights import verify

BACKEND = "shared_memory"

HOLDER_VARIABLE = "DISTILL_ENGINE_HOLDER"
"""Environment variable with the process id of the engine's owner; set by actors.engine."""

_WATCH_EVERY_S = 0.5


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the file carries names, shapes and number formats."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """A push, as in :class:`distill.interfaces.WeightManifest`."""

    path: str
    policy_version: int
    update: int
    num_bytes: int
    checksum: str


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads a push from a file on this node; every tensor-parallel rank takes its own shard."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """No rendezvous."""

    def start_weight_update(self) -> None:
        """Nothing yet: a push that fails its checksum must not have touched the model."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base's: it synchronises an accelerator, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Check the bytes, then load them.

        Raises: WeightPushError when they are not what was announced, or not the whole model.
        """
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        verify(WeightManifest(**vars(update_info)))
        self._check_shapes(update_info)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(_tensors(update_info.path))  # pyright: ignore[reportCallIssue]
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_heads(self.model)

    def _check_shapes(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Compare with the checkpoint that the engine was started from: the reload fills what
        is missing of a fused parameter with whatever was in memory."""
        expected = _shapes(*Path(self.model_config.model).glob("*.safetensors"))
        if self.model_config.hf_text_config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        got = _shapes(update_info.path)
        for name, shape in expected.items():
            if got.get(name) != shape:
                raise WeightPushError(
                    f"weights of policy version {update_info.policy_version} in {update_info.path}: shape of {name}",
                    got.get(name, "none"), f"be {shape}",
                )  # fmt: skip

    def finish_weight_update(self) -> None:
        """Nothing left: :meth:`receive_weights` is the whole transaction."""

    def shutdown(self) -> None:
        """Nothing is held between pushes."""


class WorkerExtension:
    """Mixed into vLLM's worker class; its import is what matters."""


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


def _shapes(*paths: str | Path) -> dict[str, list[int]]:
    """Shapes by name, from the files' headers."""
    shapes: dict[str, list[int]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _repack_heads(model: torch.nn.Module) -> None:
    """Renew the packed copy of the vocabulary head that the CPU build multiplies with.

    A head tied to the embedding has no name of its own in the file, so the reload passes it
    by: it would go on with the old weights, silently.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def _register() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)


def _watch(holder_id: int) -> None:
    """End this process, and the engine core above it, when the holder is gone."""
    parent_id = os.getppid()
    try:
        holder = psutil.Process(holder_id)
        while holder.is_running() and holder.status() != psutil.STATUS_ZOMBIE and os.getppid() == parent_id:
            time.sleep(_WATCH_EVERY_S)
    except psutil.NoSuchProcess:
        pass
    # With several ranks the engine core stands between holder and worker and never imports
    # this module, so a worker takes it along. It is ours while it is still our parent.
    if parent_id not in (1, holder_id) and os.getppid() == parent_id:
        os.kill(parent_id, signal.SIGKILL)
    os._exit(1)


def _start_watchdog() -> None:
    holder_id = int(os.environ.get(HOLDER_VARIABLE, "0"))
    if holder_id and holder_id != os.getpid():
        threading.Thread(target=_watch, args=(holder_id,), name="distill-watchdog", daemon=True).start()


_register()
_start_watchdog()
settle_vector_math()
