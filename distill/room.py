"""A medium without room: how the system says it, and the one error that the user sees.

:mod:`distill.files` and the stores write inside :func:`needs_room`. What is half-written is removed by them, so that
the same call can be made again once there is room.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import NO_VALUE, DistillError

IN_MEMORY = (
    "give the container a larger /dev/shm (of a pod: an emptyDir with medium: Memory and a sizeLimit), or lower "
    "replay.memory_bytes"
)
"""The remedy for shared memory."""
ON_DISK = "free some there or lower checkpoint.keep; then resume the run"
"""The remedy for the run folder."""
IN_CACHE = "free some there or set DISTILL_CACHE to a folder with more room; then resume the run, which keeps what is finished"
"""The remedy for the cache."""

_MEMORY = Path("/dev/shm")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_IN_TEXT = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
"""How libraries in Rust (safetensors, tokenizers), and ``shutil.copytree``, name the system's error."""


class NoSpace(DistillError, OSError):
    """A file that a medium has no room for. It is not there, or as it was before."""

    code = "no_space"

    def __init__(self, name: str | Path, value: object, must: str, remedy: str = "") -> None:
        super().__init__(name, value, must, remedy)
        self.errno = errno.ENOSPC  # OSError takes its first argument for it

    @classmethod
    def of(cls, number: int, path: Path, num_bytes: int | None = None) -> NoSpace:
        """The error for ``path``, by the system's number. ``num_bytes``: what it needs, if that is known."""
        remedy = IN_MEMORY if path.is_relative_to(_MEMORY) else ON_DISK
        if number == errno.EFBIG:
            must = "be within the system's limit on the size of a file"
            return cls(
                f"size of {path}", _shown(num_bytes), must, "raise the limit (ulimit -f); then resume the run"
            )
        needs = "be enough for it" if num_bytes is None else f"be >= {_shown(num_bytes)}"
        if number == errno.EDQUOT:
            return cls(f"the user's quota for {path}", NO_VALUE, needs, f"raise it, or {remedy}")
        free, has_inodes = _free(path)
        if not has_inodes:
            return cls(f"free inodes for {path}", 0, "be >= 1", f"delete files there, or {remedy}")
        return cls(f"free space for {path}", _shown(free), needs, remedy)


@contextmanager
def needs_room(path: str | Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn the error of a block that writes ``path``, and finds no room for it, into NoSpace.

    ``num_bytes``: what the block needs, if that is known. Other errors pass.

    Raises: NoSpace.
    """
    try:
        yield
    except NoSpace:
        raise
    except Exception as error:
        number = _number(error)
        if number not in _FULL:
            raise
        raise NoSpace.of(number, Path(path), num_bytes) from error


@contextmanager
def advising(remedy: str) -> Iterator[None]:
    """Give the NoSpace of a block another remedy."""
    try:
        yield
    except NoSpace as error:
        raise NoSpace(error.name, error.value, error.must, remedy) from error


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    named = _IN_TEXT.search(str(error))
    return int(named[1] or named[2]) if named else None


def _free(path: Path) -> tuple[int | None, bool]:
    """The bytes that are free where ``path`` is or would be, and whether one more file can be there."""
    place = next((each for each in (path, *path.parents) if each.exists()), None)
    if place is None:
        return None, True
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize, not status.f_files or status.f_favail > 0


def _shown(num_bytes: int | None) -> object:
    if num_bytes is None:
        return NO_VALUE
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 1 << 20 else f"{num_bytes} bytes"
