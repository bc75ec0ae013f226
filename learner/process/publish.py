"""The learner's side of a weight push: a transaction with a deadline and a checksum.

The version is persisted before anything is written and never used twice, so a crash between two steps
can leave a gap in the versions, but never two sets of weights under one number. The bytes are in one
shared-memory file per node, which every engine on the node maps; the first one verifies it.

On GPUs, vLLM's own trainer engines (NCCL, CUDA IPC) can replace the file; see
:class:`TrainerEnginePublisher`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from distill.config import RunConfig
from distill.errors import NO_VALUE
from distill.interfaces import WeightManifest, WeightPushError
from distill.machine.hardware import resolve_dtype
from distill.weights import remove_old_weights, write_weights
from learner.process.weight_file import WeightSource, write_tensors


class WeightReceiver(Protocol):
    """A generator, local or behind a handle."""

    async def update_weights(self, manifest: WeightManifest) -> None: ...


def push_dtype(config: RunConfig) -> torch.dtype:
    """Return the number format in which the rollout engine computes, the one for its pushes.

    An engine rounds what it loads to its own format, so the format changes the bytes of a push and never the
    weights that sample. A wider one costs time, a narrower one would lose digits.
    """
    # vLLM computes on a GPU if the machine has one, plain transformers on the CPU.
    on_gpu = config.rollout.engine == "vllm" and torch.cuda.is_available()
    return getattr(torch, resolve_dtype(config.rollout.dtype, "cuda" if on_gpu else "cpu"))


class SharedMemoryPublisher:
    """Writes the weights once per push and has every receiver load them.

    :meth:`publish` is :meth:`write` and :meth:`send`. Only the first needs the parameters: a learner that calls
    them apart can compute its next update while the engines load.
    """

    def __init__(
        self,
        *,
        weights: WeightSource,
        receivers: Sequence[WeightReceiver],
        next_version: Callable[[], int],
        folder: str | Path,
        deadline_s: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``dtype``: number format of the file, that of the engines."""
        self.weights = weights
        self.receivers = list(receivers)
        self.next_version = next_version
        self.folder = Path(folder)
        self.deadline_s = deadline_s
        self.dtype = dtype
        self.push_s = 0.0
        """Seconds that :meth:`write` and :meth:`send` of the last push took together."""
        self._write_s: dict[int, float] = {}
        """The same of :meth:`write` alone, for the versions that have not been sent."""
        self._sending = asyncio.Lock()  # in the order of the calls, because engines refuse older versions

    async def stats(self) -> dict[str, float]:
        """Counters for the metrics of an update."""
        return {"timing/push_s": self.push_s}

    async def publish(self, updates_done: int) -> int:
        """Push the weights after ``updates_done`` updates; returns their policy version.

        Raises: WeightPushError when a receiver refuses, dies or passes the deadline.
        """
        manifest = await self.write(updates_done)
        await self.send(manifest)
        return manifest.policy_version

    async def write(self, updates_done: int) -> WeightManifest:
        """Copy the weights after ``updates_done`` updates into the file of a new version.

        The parameters must not change before this returns, and may change afterwards.
        """
        start = time.monotonic()
        version = self.next_version()
        manifest = await asyncio.to_thread(
            write_weights,
            self.folder,
            partial(write_tensors, self.weights, self.dtype),
            policy_version=version,
            update=updates_done,
        )
        self._write_s[version] = time.monotonic() - start
        return manifest

    async def send(self, manifest: WeightManifest) -> None:
        """Have every receiver load a file.

        Raises: WeightPushError when a receiver refuses, dies or passes the deadline.
        """
        async with self._sending:
            start = time.monotonic()
            version = manifest.policy_version
            try:
                async with asyncio.timeout(self.deadline_s):
                    await asyncio.gather(*(receiver.update_weights(manifest) for receiver in self.receivers))
            except TimeoutError as error:
                raise WeightPushError(
                    f"push of policy version {version}", NO_VALUE,
                    f"reach all {len(self.receivers)} engines within weights.deadline_s={self.deadline_s}",
                    "raise the deadline, or look for an engine that hangs",
                ) from error  # fmt: skip
            remove_old_weights(self.folder, before=version)
            self.push_s = self._write_s.pop(version) + time.monotonic() - start


class TrainerEnginePublisher:
    """vLLM's own trainer engines: NCCL broadcast or CUDA IPC. No run uses it yet, and it has not run on a GPU.

    ``send_weights`` drives start, update and finish through ``client`` and is called on every
    trainer rank; FSDP shards are gathered by vLLM's ``ModuleSource`` in parameter order.
    """

    def __init__(
        self,
        *,
        init_info: Any,
        client: Any,
        module: nn.Module,
        next_version: Callable[[], int],
        deadline_s: float,
    ) -> None:
        """``init_info``: vLLM's ``NCCLTrainerInitInfo`` or ``IPCTrainerInitInfo``; ``client``:
        its ``RayVLLMWeightSyncClient`` over the rollout actors."""
        from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory

        self.client = client
        self.engine = WeightTransferTrainerFactory.trainer_init(
            init_info, client=client, source=ModuleSource(module)
        )
        self.next_version = next_version
        self.deadline_s = deadline_s

    async def publish(self, updates_done: int) -> int:
        """As :meth:`SharedMemoryPublisher.publish`. A raw NCCL broadcast has no deadline of its
        own: when ours passes, the caller ends this process."""
        version = self.next_version()
        try:
            async with asyncio.timeout(self.deadline_s):
                await asyncio.to_thread(self.engine.send_weights)
                await asyncio.to_thread(self.client.finish_weight_update, str(version))
        except TimeoutError as error:
            raise WeightPushError(
                f"push of policy version {version}", NO_VALUE,
                f"be confirmed within weights.deadline_s={self.deadline_s}", "raise the deadline",
            ) from error  # fmt: skip
        return version
