"""Wire format of a weight push: one safetensors file in shared memory, and a manifest in the message.

The learner writes a file with :func:`write_weights`. Every engine on the node checks it with :func:`verify`
before it changes its own weights. A file appears under its final name only when it is complete, and never
changes afterwards, so one checksum is valid for every reader.

This module does without torch: the caller passes a function that writes the tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import xxhash

from distill.errors import NO_VALUE
from distill.files import replacing_file
from distill.interfaces import WeightManifest, WeightPushError

_CHUNK_BYTES = 4 << 20
"""Read size of the checksum. It fits the second-level cache, and unlike a memory mapping, reading cannot
raise SIGBUS when the file shrinks."""

_FILE_NAME = re.compile(r"weights-v(\d{8,})\.safetensors")


def weights_path(shm_dir: str | Path, policy_version: int) -> Path:
    """Return the path of a version's weights in the run's folder in shared memory."""
    return Path(shm_dir) / f"weights-v{policy_version:08d}.safetensors"


def checksum_file(path: str | Path) -> tuple[int, str]:
    """Return the size in bytes, and the xxh3-64 of all bytes in hexadecimal."""
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
    """Write the file of a version; returns its manifest.

    ``write_tensors(path)`` writes a safetensors file with the student's parameters under
    their Hugging Face names (``safetensors.torch.save_file(tensors, path)``).

    Raises: FileExistsError for a version that has already been written, because versions are never re-used.
    """
    path = weights_path(shm_dir, policy_version)
    if path.exists():
        raise FileExistsError(f"{path}: policy version {policy_version} was already written")
    with replacing_file(path, durable=False) as partial:  # in memory: a push does not outlive the run
        write_tensors(partial)
        num_bytes, checksum = checksum_file(partial)
    return WeightManifest(
        policy_version=policy_version,
        update=update,
        path=str(path),
        num_bytes=num_bytes,
        checksum=checksum,
    )


def verify(manifest: WeightManifest) -> None:
    """Read every byte of the file and compare it with the manifest.

    Raises: WeightPushError with the expected and the actual size or checksum.
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
    """Return the versions whose files are in the folder, in ascending order."""
    matches = (_FILE_NAME.fullmatch(path.name) for path in Path(shm_dir).glob("weights-v*.safetensors"))
    return sorted(int(match[1]) for match in matches if match)


def remove_old_weights(shm_dir: str | Path, keep: int = 1) -> list[int]:
    """Delete all but the newest ``keep`` files; returns the versions removed.

    This is safe while an engine reads one of them: the bytes exist until the last reader closes the file.
    """
    versions = stored_versions(shm_dir)
    removed = versions[: max(0, len(versions) - keep)]
    for version in removed:
        weights_path(shm_dir, version).unlink(missing_ok=True)
    return removed
