"""Wire format of a weight push: one safetensors file in shared memory, and a manifest in the message.

The learner writes a file with :func:`write_weights`. A file appears under its final name only when it is
complete, and never changes afterwards, so one checksum is valid for every reader. A receiver loads it inside
:func:`loading`, which keeps the file from being removed meanwhile, and checks the bytes before the receiver
changes its own weights. The bytes are read for that only once per node, whatever the number of receivers.

This module does without torch: the caller passes a function that writes the tensors.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

import xxhash

from distill.errors import NO_VALUE
from distill.files import replacing_file
from distill.interfaces import WeightManifest, WeightPushError
from distill.room import NoSpace, needs_room

_CHUNK_BYTES = 4 << 20
"""Read size of the checksum. It fits the second-level cache, and unlike a memory mapping, reading cannot
raise SIGBUS when the file shrinks."""

_FILE_NAME = re.compile(r"weights-v(\d{8,})\.safetensors")


class StalePush(WeightPushError):
    """A push that is not newer than the weights of the engine, which keeps them and stays usable."""

    code = "stale_push"


class HashedFile:
    """Hashes the bytes that it writes."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._digest = xxhash.xxh3_64()
        self.num_bytes = 0

    def write(self, data: Any) -> None:
        """Append a bytes-like object."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.num_bytes += len(view)
        while len(view):  # the kernel writes at most 2 GiB at a time
            view = view[self._file.write(view) :]

    def checksum(self) -> str:
        """Return the xxh3-64 of all bytes in hexadecimal."""
        return self._digest.hexdigest()


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
    shm_dir: str | Path,
    write: Callable[[HashedFile], object],
    *,
    policy_version: int,
    update: int,
    spill_dir: str | Path | None = None,
) -> WeightManifest:
    """Write the file of a version; returns its manifest.

    ``spill_dir``: the folder for the file when shared memory has no room for it. A receiver maps it there as well.

    ``write(file)`` writes a safetensors file with the student's parameters under their Hugging Face names
    (``file.write(safetensors.torch.save(tensors))``).

    Raises: FileExistsError for a version that has already been written, because versions are never re-used; NoSpace.
    """
    folders = [shm_dir] if spill_dir is None else [shm_dir, spill_dir]
    for path in (weights_path(folder, policy_version) for folder in folders):
        if path.exists():
            raise FileExistsError(f"{path}: policy version {policy_version} was already written")
    try:
        return _write_file(weights_path(shm_dir, policy_version), write, policy_version, update)
    except NoSpace:
        if spill_dir is None:
            raise
        return _write_file(weights_path(spill_dir, policy_version), write, policy_version, update)


def _write_file(
    path: Path, write: Callable[[HashedFile], object], policy_version: int, update: int
) -> WeightManifest:
    # Not durable: the file is in memory, and a push does not outlive the run.
    with replacing_file(path, durable=False) as partial, open(partial, "xb", buffering=0) as raw:
        file = HashedFile(raw)
        write(file)
    return WeightManifest(
        policy_version=policy_version,
        update=update,
        path=str(path),
        num_bytes=file.num_bytes,
        checksum=file.checksum(),
    )


def require_newer(pushed: int, current: int) -> None:
    """Raise StalePush unless the version of a push is newer than that of the engine's weights."""
    if pushed <= current:
        raise StalePush(
            "policy version of a push", pushed, f"be above {current}, the version that the engine has"
        )


@contextmanager
def loading(manifest: WeightManifest) -> Iterator[None]:
    """Verify a push, and keep its file from being removed for the length of a ``with`` block.

    A receiver can still be loading a push that the learner has given up, and the learner's next push removes
    old files.

    Raises: WeightPushError as :func:`verify`.
    """
    _require_place(manifest)
    with _opened(manifest, Path(manifest.path), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        verify_once(manifest)
        yield


def _require_place(manifest: WeightManifest) -> None:
    """Raises: WeightPushError for a path that no push has, before a file is opened or a marker written beside it."""
    path = Path(manifest.path)
    if ".." in path.parts or path != weights_path(path.parent, manifest.policy_version):
        must = f"be named {weights_path('', manifest.policy_version)}, as the file of policy version {manifest.policy_version}"
        raise WeightPushError("path of a push", manifest.path, must)


def verify_once(manifest: WeightManifest) -> None:
    """Verify a push, unless a process of this node already has.

    The first process holds a lock while it reads the bytes, and leaves a marker beside the file. The others
    wait for the lock and trust the marker. It names the checksum and the file's modification time, so a file
    that has been written to since is read again.

    Raises: WeightPushError as :func:`verify`, which leaves no marker.
    """
    _require_place(manifest)
    try:
        status = os.stat(manifest.path)
    except OSError as error:
        raise _unreadable(manifest, error) from error
    seal = f"{manifest.checksum} {manifest.num_bytes} {status.st_size} {status.st_ino} {status.st_mtime_ns}"
    with _opened(manifest, _marker_path(manifest.path), "a+") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        marker.seek(0)
        if marker.read() != seal:
            verify(manifest)
            marker.truncate(0)
            with suppress(NoSpace), needs_room(marker.name):  # without it, the next process verifies as well
                os.write(marker.fileno(), seal.encode())


def verify(manifest: WeightManifest) -> None:
    """Read every byte of the file and compare it with the manifest.

    Raises: WeightPushError with the expected and the actual size or checksum.
    """
    name = _name(manifest)
    try:
        size = os.stat(manifest.path).st_size
        if size != manifest.num_bytes:
            raise WeightPushError(f"{name}: size", f"{size} bytes", f"be {manifest.num_bytes} bytes")
        _, checksum = checksum_file(manifest.path)
    except OSError as error:
        raise _unreadable(manifest, error) from error
    if checksum != manifest.checksum:
        raise WeightPushError(f"{name}: checksum", checksum, f"be {manifest.checksum} (xxh3-64)")


def _name(manifest: WeightManifest) -> str:
    return f"weights of policy version {manifest.policy_version} in {manifest.path}"


def _unreadable(manifest: WeightManifest, error: OSError) -> WeightPushError:
    return WeightPushError(_name(manifest), NO_VALUE, f"be in a readable file ({error})")


def _opened(manifest: WeightManifest, path: Path, mode: str) -> IO[Any]:
    try:
        return open(path, mode)
    except OSError as error:
        raise _unreadable(manifest, error) from error


def _marker_path(path: str | Path) -> Path:
    return Path(f"{path}.verified")


def stored_versions(shm_dir: str | Path) -> list[int]:
    """Return the versions whose files are in the folder, in ascending order."""
    matches = (_FILE_NAME.fullmatch(path.name) for path in Path(shm_dir).glob("weights-v*.safetensors"))
    return sorted(int(match[1]) for match in matches if match)


def remove_old_weights(shm_dir: str | Path, before: int) -> list[int]:
    """Delete the files of versions below ``before``; returns the versions removed.

    A file that a receiver is :func:`loading` stays until a later call.
    """
    old = [version for version in stored_versions(shm_dir) if version < before]
    return [version for version in old if _remove(weights_path(shm_dir, version))]


def _remove(path: Path) -> bool:
    """Remove a file and its marker; returns whether it has."""
    try:
        with open(path, "rb") as file:
            # A receiver that has opened the file, but does not hold the lock yet, finds it gone when it verifies.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            _marker_path(path).unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        return False
    return True
