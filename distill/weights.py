"""Wire format of a weight push: one safetensors file in shared memory and its manifest.

The learner writes a segment with :func:`write_weights`; every engine on the node checks it
with :func:`verify` before it touches its own weights. A segment appears under its name only
when it is whole (it is written beside it and renamed), and never changes afterwards, so a
checksum taken once holds for every reader.

Torch-free: the caller hands a function that writes the tensors.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import xxhash

from distill.errors import NO_VALUE
from distill.files import replacing_file
from distill.interfaces import WeightManifest, WeightPushError

_CHUNK_BYTES = 4 << 20
"""Read size of the checksum: fits the second cache level, and unlike a mapping it cannot
raise SIGBUS when a file shrinks under it."""

_SEGMENT_NAME = re.compile(r"weights-v(\d{8,})\.safetensors")


def segment_path(shm_dir: str | Path, policy_version: int) -> Path:
    """Where the weights of a version lie within the run's folder in shared memory."""
    return Path(shm_dir) / f"weights-v{policy_version:08d}.safetensors"


def manifest_path(path: str | Path) -> Path:
    """Where the manifest of a segment lies: beside it."""
    return Path(path).with_suffix(".json")


def checksum_file(path: str | Path) -> tuple[int, str]:
    """Size in bytes, and xxh3-64 over all bytes in hexadecimal."""
    digest = xxhash.xxh3_64()
    num_bytes = 0
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(buffer):
            digest.update(view[:read])
            num_bytes += read
    return num_bytes, digest.hexdigest()


def write_weights(
    shm_dir: str | Path, write_tensors: Callable[[Path], object], *, policy_version: int, update: int
) -> WeightManifest:
    """Write the segment of a version and its manifest.

    ``write_tensors(path)`` writes a safetensors file with the student's parameters under
    their Hugging Face names (``safetensors.torch.save_file(tensors, path)``).

    Raises: FileExistsError for a version that was already written: versions are never re-used.
    """
    path = segment_path(shm_dir, policy_version)
    if path.exists():
        raise FileExistsError(f"{path}: policy version {policy_version} was already written")
    with replacing_file(path, durable=False) as partial:  # in memory: a push does not outlive the run
        write_tensors(partial)
        num_bytes, checksum = checksum_file(partial)
        manifest = WeightManifest(
            policy_version=policy_version,
            update=update,
            path=str(path),
            num_bytes=num_bytes,
            checksum=checksum,
        )
        # The manifest first: a segment under its final name always has one.
        with replacing_file(manifest_path(path), durable=False) as file:
            file.write_text(json.dumps(asdict(manifest)))
    return manifest


def read_manifest(path: str | Path) -> WeightManifest:
    """The manifest written beside a segment.

    Raises: WeightPushError when it cannot be read.
    """
    beside = manifest_path(path)
    try:
        return WeightManifest(**json.loads(beside.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise WeightPushError("manifest", beside, f"be a weight manifest ({error})") from error


def verify(manifest: WeightManifest) -> None:
    """Check that the segment is what the manifest says, reading every byte.

    Raises: WeightPushError naming what was expected and what was found.
    """
    name = f"weights of policy version {manifest.policy_version} in {manifest.path}"
    try:
        size = os.stat(manifest.path).st_size
        if size != manifest.num_bytes:
            raise WeightPushError(f"{name}: size", f"{size} bytes", f"be {manifest.num_bytes} bytes")
        _, checksum = checksum_file(manifest.path)
    except OSError as error:
        raise WeightPushError(name, NO_VALUE, f"be in a readable file ({error})") from error
    if checksum != manifest.checksum:
        raise WeightPushError(f"{name}: checksum", checksum, f"be {manifest.checksum} (xxh3-64)")


def stored_versions(shm_dir: str | Path) -> list[int]:
    """Versions whose segments lie in the folder, rising."""
    matches = (_SEGMENT_NAME.fullmatch(path.name) for path in Path(shm_dir).glob("weights-v*.safetensors"))
    return sorted(int(match[1]) for match in matches if match)


def remove_old_segments(shm_dir: str | Path, keep: int = 1) -> list[int]:
    """Delete all but the newest ``keep`` segments; returns the versions removed.

    Safe while an engine still reads one: the bytes live until the last reader closes.
    """
    versions = stored_versions(shm_dir)
    removed = versions[: max(0, len(versions) - keep)]
    for version in removed:
        path = segment_path(shm_dir, version)
        path.unlink(missing_ok=True)
        manifest_path(path).unlink(missing_ok=True)
    return removed
