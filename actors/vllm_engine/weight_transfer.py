"""What runs inside vLLM's worker processes: the project's weight-transfer engine, and a watchdog.

vLLM imports this module in every worker before it loads the model, because the engine arguments contain
``worker_extension_cls="actors.vllm_engine.weight_transfer.WorkerExtension"``. That works from a working
directory, without installation. The import does three things:

- It registers the ``shared_memory`` backend. A push is a safetensors file in shared memory. The backend
  compares it with its size and checksum before it changes the model, unless a process of the node has
  already done that, and then loads it with vLLM's own layerwise reload, because the CPU build repacks weights and they cannot be copied in place.
- It starts a watchdog in a process that an engine of this project started. Without the watchdog, a worker
  outlives an owner that is killed, and keeps the device's memory.
- It settles MKL's vector functions before the model computes its rotary table with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from actors.vllm_engine.processes import start_watchdog
from distill.interfaces import WeightManifest, WeightPushError
from distill.machine.vector_math import settle_vector_math
from distill.weights import loading

BACKEND = "shared_memory"
"""Name of the transfer engine in vLLM's registry."""


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Empty, because the file contains names, shapes and number formats."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """A push, as in :class:`distill.interfaces.WeightManifest`."""

    path: str
    policy_version: int
    update: int
    num_bytes: int
    checksum: str


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Loads a push from a file on this node; every tensor-parallel rank loads its own shard."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Do nothing: a file needs no rendezvous."""

    def start_weight_update(self) -> None:
        """Do nothing yet: a push with a wrong checksum must leave the model unchanged."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises an accelerator, which raises on a machine without one.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Check the bytes, then load them.

        Raises: WeightPushError when the file differs from its manifest or does not contain the whole model.
        """
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        with loading(WeightManifest(**vars(update_info))):
            self._check_shapes(update_info)
            initialize_layerwise_reload(self.model)
            self.model.load_weights(_tensors(update_info.path))  # pyright: ignore[reportCallIssue]
            finalize_layerwise_reload(self.model, self.model_config)
        _repack_heads(self.model)

    def _check_shapes(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Compare with the checkpoint that the engine was started from.

        The reload does not: where a part of a fused parameter is missing, it leaves uninitialised memory.
        """
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
        """Do nothing: :meth:`receive_weights` is the whole transaction."""

    def shutdown(self) -> None:
        """Do nothing: no resources are kept between pushes."""


class WorkerExtension:
    """Mixed into vLLM's worker class. It is empty: its purpose is that vLLM imports this module."""


def _tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.offset_keys():  # in the order of the bytes
            yield name, file.get_tensor(name)


def _shapes(*paths: str | Path) -> dict[str, list[int]]:
    """Read shapes by name from the headers of the files."""
    shapes: dict[str, list[int]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _repack_heads(model: torch.nn.Module) -> None:
    """Renew the packed copy of the vocabulary head that the CPU build multiplies with.

    A head tied to the embedding has no name in the file, so the reload skips it, and the packed copy
    would silently keep the old weights.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def _register() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)


_register()
start_watchdog()
settle_vector_math()
