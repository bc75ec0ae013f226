"""The floor of a push, inside vLLM's worker process, which imports this module."""

from __future__ import annotations

import time
from typing import Any

from safetensors.torch import load_file

# The import registers the transfer engine and starts the watchdog, as in a run.
from actors.vllm_engine.weight_transfer import WorkerExtension


class FloorExtension(WorkerExtension):
    """Mixed into vLLM's worker class for the benchmark."""

    def load_floor(self, path: str) -> float:
        """Load the weights of a safetensors file as vLLM does it; returns the seconds without reading the file."""
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        worker: Any = self
        model = worker.model_runner.get_model()
        tensors = load_file(path)
        for tensor in tensors.values():
            tensor.view(-1)[::1024].sum()  # touches every page: reading the file is not part of the floor
        start = time.perf_counter()
        initialize_layerwise_reload(model)
        model.load_weights(iter(tensors.items()))
        finalize_layerwise_reload(model, worker.model_config)
        return time.perf_counter() - start
