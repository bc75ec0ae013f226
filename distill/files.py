"""Durable writes: the project replaces files and folders only through this module.

A file or folder is written under a temporary name next to its destination and then renamed, so that
neither a reader nor a crash can see half of it. The data reaches the disk before the rename, and the
rename before the call returns. A process that dies while it writes leaves a name for which
:func:`is_temporary` is true; :func:`remove_temporaries` deletes such files and folders.

A medium without room raises :class:`distill.room.NoSpace`, and then everything is as it was before the call.

:class:`LineFile` is for files that grow while others read them: a crash can cut their last line, which readers
skip.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from distill.room import needs_room

T = TypeVar("T")
NOT_AS_WRITTEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""What reading a broken line raises."""

_HERE, _RENAME_EXCHANGE = -100, 2
"""Of Linux's renameat2: paths are relative to the working directory, and both names exist."""

_numbers = itertools.count()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file. After a crash either the old or the new file is there, complete."""
    with replacing_file(path, num_bytes=len(data)) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file. Numbers that JSON cannot represent (NaN, infinity) become null."""
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def replacing_file(path: Path, *, durable: bool = True, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path for the caller to write, and rename it to ``path`` at the end.

    On an exception nothing changes. ``durable=False`` does not wait for the disk; it is meant for
    files in memory and for those that can be produced again. ``num_bytes``: what the file needs, for the error.

    Raises: NoSpace.
    """
    with needs_room(path, num_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            yield temporary
            if durable:
                sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync(path.parent)


@contextmanager
def new_folder(
    path: Path, *, if_exists: Literal["replace", "keep"] = "replace", num_bytes: int | None = None
) -> Iterator[Path]:
    """Yield an empty temporary folder for the caller to fill, and rename it to ``path`` at the end.

    ``if_exists`` decides what happens if ``path`` is a folder by then. ``replace``: the new folder
    replaces it. ``keep``: it stays and the new one is deleted, for folders that two processes may
    create at the same time with equal contents. ``num_bytes``: what it needs, for the error. On an exception nothing
    changes.

    Raises: NoSpace.
    """
    with needs_room(path, num_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            put_folder(temporary, path, if_exists=if_exists)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def put_folder(made: Path, place: Path, *, if_exists: Literal["replace", "keep"]) -> None:
    """Rename a finished folder to its destination on the same file system; see :func:`new_folder`."""
    for path in (*made.rglob("*"), made):
        sync(path)
    if if_exists == "keep":
        try:
            made.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(made)
    elif place.exists():
        _exchange(made, place)
    else:
        made.rename(place)
    sync(place.parent)
    shutil.rmtree(made, ignore_errors=True)  # what was there before


def _exchange(made: Path, place: Path) -> None:
    """Exchange the names of two folders.

    Linux does it in one step. Where it cannot (another system, some network file systems), there is a moment between
    two renames in which a crash leaves neither folder at ``place``.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        paths = (_HERE, os.fsencode(made), _HERE, os.fsencode(place))
        if renameat2(*paths, _RENAME_EXCHANGE) == 0:
            return
        if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number), str(place))
    old = _temporary(place)
    place.rename(old)
    try:
        made.rename(place)
    except BaseException:
        old.rename(place)
        raise
    old.rename(made)


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Return whether an unfinished write has this name."""
    return name.startswith(".") and name.endswith(".tmp")


def remove_temporaries(folder: Path, *, of: str = "", unchanged_s: float = 0.0) -> None:
    """Delete what dead writers left in a folder.

    ``of``: how the names begin that the files would have got.

    The caller ensures that no writer is active in it, or says for how many seconds a writer changes nothing only if it is dead.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        is_meant = is_temporary(path.name) and path.name[1:].startswith(of)
        if is_meant and time.time() - _last_change(path) >= unchanged_s:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class LineFile:
    """A file of lines that only grows. Opening it ends a line that a crash cut. Safe to use from several threads.

    Several of them, in one process or more, may append to one file.
    """

    def __init__(self, path: Path) -> None:
        """Raises: NoSpace."""
        self._path = path
        with needs_room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._guard = threading.Lock()
        with self._locked():
            size = self.num_bytes
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                self._write(b"\n")

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._file).st_size

    def append(self, line: str) -> None:
        """Append one line, which every reader sees once this returns.

        Raises: NoSpace, and then nothing of it is in the file.
        """
        with self._locked():
            self._write(f"{line}\n".encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude other writers, because a line that does not fit is cut off again, which must not cut another's."""
        with self._guard:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _write(self, data: bytes) -> None:
        size, left = self.num_bytes, memoryview(data)
        try:
            with needs_room(self._path, len(data)):
                while left:
                    left = left[os.write(self._file, left) :]
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def sync(self) -> None:
        """Make every line so far durable. Raises: NoSpace, on file systems that reserve no room earlier."""
        with needs_room(self._path):
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class LineReader(Generic[T]):
    """Iterates over the JSON lines of such a file, without trust: it may still be written, or its writer have died."""

    def __init__(self, path: Path, parse: Callable[[Any], Iterable[T]]) -> None:
        """``parse(value)`` returns what a line says; any error of :data:`NOT_AS_WRITTEN` means that it is broken."""
        self._path = path
        self._parse = parse
        self.num_broken = 0
        """Lines that a crash or a running write cut, or that are not as their writer writes them."""

    def __iter__(self) -> Iterator[T]:
        """Raises: OSError."""
        self.num_broken = 0
        with self._path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    found = list(self._parse(json.loads(text)))
                except NOT_AS_WRITTEN:
                    self.num_broken += bool(text.strip())
                    continue
                yield from found


def is_plain_name(name: object) -> bool:
    """Return whether a name from a file or a message can only be that of a file directly in its folder.

    A name such as ``../x`` or ``/etc/x`` would lead out of the folder that it is joined to.
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def whole_number(value: Any) -> int:
    """Return a value of JSON. Raises: ValueError when it is not a whole number that every program reads exactly."""
    if type(value) is not int or abs(value) >= 1 << 53:
        raise ValueError(f"{value!r:.40} must be a whole number")
    return value


def plain(value: Any) -> Any:
    """Convert ``value`` to plain JSON types; numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _last_change(path: Path) -> float:
    """When a file, or something in a folder, was last changed: seconds since the epoch."""
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return max(each.lstat().st_mtime for each in (path, *inside))


def _temporary(path: Path) -> Path:
    """Return a name next to ``path`` that no other writer uses, in this process or another.

    A dead process can have had the pid of this one, which is common in containers, so names that
    already exist are skipped.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}.tmp")
        if not os.path.lexists(temporary):
            return temporary
