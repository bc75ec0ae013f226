"""Small file systems that are really full, for tests of what a run does then."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Mount a tmpfs of this size on a folder. The test is skipped where this is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if mount else None
    if done is None or done.returncode != 0:
        pytest.skip(f"no file system can be mounted here ({done.stderr.strip() if done else 'no mount'})")
    try:
        yield folder
    finally:
        # Lazy, because a mapping of a file may outlive the test's last line.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Fill the file system of a folder with one file; returns it. ``leave``: bytes that stay free."""
    path = folder / "filling"
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    with open(path, "r+b") as file:
        file.truncate(max(0, path.stat().st_size // 4096 * 4096 - leave))
    return path
