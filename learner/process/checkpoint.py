"""Checkpoints: safetensors shards, and a JSON manifest with their checksums that completes them.

They are written into a temporary folder and renamed, so a folder named ``step-N`` is always complete.
There is no pickle: tensors are safetensors, everything else is JSON.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import DistillError
from distill.files import new_folder
from distill.run.folder import checkpoint_steps
from distill.weights import checksum_file

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


class CheckpointError(DistillError, RuntimeError):
    """A checkpoint that is incomplete, damaged or of another format."""

    code = "checkpoint"


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

    def path(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write ``step-N`` and remove all but the newest ``keep``. The tensors must not change meanwhile."""
        final = self.path(step)
        with new_folder(final) as folder:
            shard = folder / "rank-0.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, shard)
            num_bytes, checksum = checksum_file(shard)
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "shards": {shard.name: {"num_bytes": num_bytes, "xxh3": checksum}},
                "state": state,
            }
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
            if not shard.exists():
                raise CheckpointError("shard", shard, "exist", _older(folder))
            num_bytes, checksum = checksum_file(shard)
            if (num_bytes, checksum) != (expected["num_bytes"], expected["xxh3"]):
                raise CheckpointError(
                    f"contents of {shard}",
                    f"{num_bytes} bytes with xxh3 {checksum}",
                    f"be {expected['num_bytes']} bytes with xxh3 {expected['xxh3']}",
                    _older(folder),
                )
            tensors |= load_file(shard)
        return tensors, manifest["state"]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint, without its tensors.

    Raises: CheckpointError when it is missing, unreadable or of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            "manifest", path, f"be a checkpoint manifest ({error})", _older(folder)
        ) from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version in {path}",
            manifest.get("format_version"),
            f"be {FORMAT_VERSION}",
            "resume with the version that wrote it, or start the run again in another run_dir",
        )
    return manifest


def _older(folder: str | Path) -> str:
    return f"delete {folder} to resume from an older checkpoint"
