"""Durable writes: the one way in which the project makes a file or a folder appear.

A file or folder is written beside its place under a temporary name and then renamed, so a reader
never meets half of one and a crash never leaves one. Data reaches the disk before the rename does,
and the rename before the call returns. A process that dies while it writes leaves a name for which
:func:`is_temporary` is true; :func:`remove_temporaries` deletes those.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

_numbers = itertools.count()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file: after a crash there is the old one or the new one, both complete."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file. Numbers that JSON has no word for (NaN, infinity) become null."""
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def replacing_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path, to be written by the caller; it takes the place of ``path`` on leaving.

    On an exception nothing changes. ``durable=False`` skips the waits for the disk: for files in
    memory, or ones that can be made again.
    """
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
def new_folder(path: Path, *, if_exists: Literal["replace", "keep"] = "replace") -> Iterator[Path]:
    """An empty temporary folder, to be filled by the caller; it becomes ``path`` on leaving.

    ``if_exists``: what happens to a folder that has the name by then. ``replace``: the new one takes
    its place. ``keep``: it stays and the new one is deleted, for folders that two processes may make
    at once with equal contents. On an exception nothing changes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        put_folder(temporary, path, if_exists=if_exists)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_folder(made: Path, place: Path, *, if_exists: Literal["replace", "keep"]) -> None:
    """Give a finished folder its name; see :func:`new_folder`. Both lie on one file system."""
    for path in (*made.rglob("*"), made):
        sync(path)
    if if_exists == "keep":
        try:
            made.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(made)
    else:
        old = _temporary(place)
        try:
            if place.exists():
                place.rename(old)
            made.rename(place)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(place.parent)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a name is one that an unfinished write has."""
    return name.startswith(".") and name.endswith(".tmp")


def remove_temporaries(folder: Path) -> None:
    """Delete what dead writers left in a folder. No writer may be at work in it."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_temporary(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """``value`` as JSON has it: numpy numbers and paths unpacked, non-finite numbers null."""
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


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other writer, of this process or another, uses.

    A dead process may have had this one's number, in a container it often has: names it left are skipped.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}.tmp")
        if not os.path.lexists(temporary):
            return temporary
