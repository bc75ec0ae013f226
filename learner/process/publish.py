"""The learner's side of a weight push: a file of the weights in shared memory.

Every engine on the node maps the file, and the first one verifies it. The driver gives the version, and has the
engines load the file (:mod:`deploy.run.training.publisher`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from distill.config import RunConfig
from distill.interfaces import WeightManifest
from distill.machine.hardware import resolve_dtype
from distill.weights import write_weights
from learner.process.weight_file import WeightSource, write_tensors


def push_dtype(config: RunConfig) -> torch.dtype:
    """Return the number format in which the rollout engine computes, the one for its pushes.

    An engine rounds what it loads to its own format, so the format changes the bytes of a push and never the
    weights that sample. A wider one costs time, a narrower one would lose digits.
    """
    # vLLM computes on a GPU if the machine has one, plain transformers on the CPU.
    on_gpu = config.rollout.engine == "vllm" and torch.cuda.is_available()
    return getattr(torch, resolve_dtype(config.rollout.dtype, "cuda" if on_gpu else "cpu"))


class WeightFile:
    """Writes the weights of one version after the other into a folder."""

    def __init__(
        self,
        weights: WeightSource,
        folder: str | Path,
        dtype: torch.dtype,
        *,
        spill_folder: str | Path | None = None,
    ) -> None:
        """``dtype``: number format of the files, that of the engines. ``spill_folder``: where a file is written for which
        ``folder`` has no room."""
        self._weights = weights
        self._folder = Path(folder)
        self._spill_folder = spill_folder
        self.dtype = dtype

    def write(self, policy_version: int, updates_done: int) -> WeightManifest:
        """Copy the weights after ``updates_done`` updates into the file of a new version.

        The parameters must not change before this returns, and may change afterwards.
        """
        return write_weights(
            self._folder,
            partial(write_tensors, self._weights, self.dtype),
            policy_version=policy_version,
            update=updates_done,
            spill_dir=self._spill_folder,
        )
