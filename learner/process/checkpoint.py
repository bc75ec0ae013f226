"""Checkpoints: safetensors shards, and a JSON manifest with their checksums that completes them.

They are written into a temporary folder and renamed, so a folder named ``step-N`` was complete once. What has happened
to it since is found by the checksums, and the checkpoint before it is used.
There is no pickle: tensors are safetensors, everything else is JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import NO_VALUE, DistillError, first_line
from distill.files import is_plain_name, new_folder
from distill.run.folder import checkpoint_steps
from distill.weights import checksum_file

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


class CheckpointError(DistillError, RuntimeError):
    """A checkpoint that is incomplete, damaged or of another format."""

    code = "checkpoint"


class OtherFormat(CheckpointError):
    """A checkpoint that another version of this program wrote. It is not damaged."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was loaded."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    damaged: tuple[str, ...]
    """What is wrong with newer ones, which were passed over, the newest first."""


class Checkpoints:
    """The ``step-N`` folders of one run."""

    def __init__(self, root: str | Path, keep: int) -> None:
        self.root = Path(root)
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return checkpoint_steps(self.root)

    def latest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def load_newest(self) -> Loaded | None:
        """Load the newest checkpoint that is whole; None without any checkpoint.

        Newer ones, which are damaged, get another name, so that they are neither used nor counted again.

        Raises: CheckpointError of the newest one when none is whole; OtherFormat for one that another version wrote.
        """
        damaged: list[CheckpointError] = []
        for step in reversed(self.steps()):
            try:
                tensors, state = self.load(self.path(step))
            except OtherFormat:
                raise
            except CheckpointError as error:
                damaged.append(error)
                continue
            for later in [each for each in self.steps() if each > step]:
                self.path(later).rename(self._free_name(later))
            return Loaded(tensors, state, tuple(error.statement for error in damaged))
        if damaged:
            raise damaged[0]
        return None

    def _free_name(self, step: int) -> Path:
        names = (self.root / f"damaged-{number}-step-{step}" for number in itertools.count())
        return next(path for path in names if not path.exists())

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write ``step-N`` and remove all but the newest ``keep``. The tensors must not change meanwhile.

        Raises: NoSpace, and then the checkpoints are those of before.
        """
        final = self.path(step)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        with new_folder(final, num_bytes=num_bytes) as folder:
            shard = folder / "rank-0.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, shard)
            num_bytes, checksum = checksum_file(shard)
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "shards": {shard.name: {"num_bytes": num_bytes, "xxh3": checksum}},
                "state": state,
            }
            manifest["xxh3"] = _checksum(manifest)
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return final

    @staticmethod
    def load(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and state of a checkpoint.

        Raises: CheckpointError when a shard is missing or its bytes are not the manifest's.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        tensors: dict[str, Tensor] = {}
        for name, expected in manifest["shards"].items():
            shard = folder / name
            if not shard.is_file():
                raise CheckpointError("shard", shard, "exist", _older(folder))
            num_bytes, checksum = checksum_file(shard)
            if (num_bytes, checksum) != (expected["num_bytes"], expected["xxh3"]):
                raise CheckpointError(
                    f"contents of {shard}",
                    f"{num_bytes} bytes with xxh3 {checksum}",
                    f"be {expected['num_bytes']} bytes with xxh3 {expected['xxh3']}",
                    _older(folder),
                )
            try:
                tensors |= load_file(shard)
            except (OSError, SafetensorError) as error:
                must = f"be a safetensors file ({first_line(error)})"
                raise CheckpointError("shard", shard, must, _older(folder)) from error
        return tensors, manifest["state"]


Copy = Callable[[int], Awaitable[tuple[dict[str, Tensor], dict[str, Any]]]]
"""Copies the learner's tensors at a step, and what it adds to the state of a checkpoint."""


class CheckpointWriter:
    """Writes the checkpoints of a learner that goes on meanwhile, from copies of its tensors."""

    def __init__(self, checkpoints: Checkpoints, copy: Copy) -> None:
        self._checkpoints = checkpoints
        self._copy = copy
        self._unsaved: tuple[int, dict[str, Tensor], dict[str, Any]] | None = None
        """A step with its tensors and state, which are not on the disk yet."""

    async def save(self, step: int, state: dict[str, Any]) -> float:
        """Write a checkpoint; returns the seconds that the copy took.

        Raises: NoSpace, and then the copy is kept: the same call can be made again although the learner has gone on.
        """
        copy_s = 0.0
        if self._unsaved is None or self._unsaved[0] != step:
            start = time.monotonic()
            self._unsaved = None  # the memory of an older one is needed for the copy
            self._unsaved = step, *await self._copy(step)
            copy_s = time.monotonic() - start
        _, tensors, own = self._unsaved
        await asyncio.to_thread(self._checkpoints.save, step, tensors, state | own)
        self._unsaved = None
        return copy_s


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint, without its tensors.

    Raises: CheckpointError when it is missing, unreadable or of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "manifest", path, f"be a checkpoint manifest ({error})", _older(folder)
        ) from error
    if not isinstance(manifest, dict) or not {"shards", "state"} <= manifest.keys():
        raise CheckpointError("manifest", path, "contain shards and state", _older(folder))
    _require_shape(manifest, path)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise OtherFormat(
            f"format_version in {path}",
            manifest.get("format_version"),
            f"be {FORMAT_VERSION}",
            "resume with the version that wrote it, or start the run again in another run_dir",
        )
    if (checksum := manifest.pop("xxh3", None)) is not None and checksum != _checksum(manifest):
        raise CheckpointError(
            f"contents of {path}", _checksum(manifest), f"have the checksum {checksum}", _older(folder)
        )
    return manifest


def _require_shape(manifest: dict[str, Any], path: Path) -> None:
    """Raises: CheckpointError for parts of another type, and for a shard that is not a file of the checkpoint."""
    shards = manifest["shards"]
    if not isinstance(shards, dict) or not isinstance(manifest["state"], dict):
        raise CheckpointError("manifest", path, "have objects as shards and state", _older(path.parent))
    for name, expected in shards.items():
        if not is_plain_name(name):
            must = "name files in the folder of the checkpoint"
            raise CheckpointError(f"shards of {path}", repr(name), must, _older(path.parent))
        if not isinstance(expected, dict) or not {"num_bytes", "xxh3"} <= expected.keys():
            raise CheckpointError(
                f"shard {name} of {path}", NO_VALUE, "have num_bytes and xxh3", _older(path.parent)
            )


def _checksum(manifest: dict[str, Any]) -> str:
    """Of the values, whatever the spaces between them."""
    return xxhash.xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _older(folder: str | Path) -> str:
    return f"bring {folder} back from a copy, or start the run again in another run_dir"
