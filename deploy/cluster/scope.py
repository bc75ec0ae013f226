"""What a run holds of its machine while it lives: its folder in shared memory, and its end by signal."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TextIO

from distill.replay.segments import sweep
from distill.run.inputs import shared_memory_root

CLAIM_TIMEOUT_S = 60.0
"""For which a driver waits while others claim their folders, which takes each of them moments."""
_DRIVER_LOCK = ".driver"
"""Locked by the driver while it lives, in the run's folder in shared memory."""


class SharedFolder:
    """The run's folder in shared memory, and the removal of those whose driver is gone.

    A driver holds a lock on a file in its folder; the kernel drops it with the process.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._path = shared_memory_root() / f"distill-{run_id}"

    def claim(self) -> None:
        root = shared_memory_root()
        # One at a time: between another driver's mkdir and its lock, its folder looks like nobody's.
        path = root / f".distill-claim-{os.getuid()}"
        with open(path, "w") as claiming:
            _lock(claiming, path)
            sweep(
                root,
                lambda run_id: (
                    run_id == self._run_id or _is_locked(root / f"distill-{run_id}" / _DRIVER_LOCK)
                ),
            )
            shutil.rmtree(self._path, ignore_errors=True)
            self._path.mkdir(mode=0o700)
            self._lock = open(self._path / _DRIVER_LOCK, "w")  # noqa: SIM115
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        self._lock.close()


class SigtermAsCtrlC:
    """SIGTERM raises KeyboardInterrupt from now on: job schedulers end a run by it, and what the
    run holds is given back as after Ctrl-C. Only the main thread can take signals."""

    def __init__(self) -> None:
        self._previous = signal.getsignal(signal.SIGTERM)
        self.take()

    def take(self) -> None:
        """Once more, after a library has set a handler of its own."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)


def _lock(file: TextIO, path: Path) -> None:
    """Raises: TimeoutError."""
    deadline = time.monotonic() + CLAIM_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{path} must be free within {CLAIM_TIMEOUT_S:g} s and is locked by another driver that "
                    "starts; look for one that is stopped (fuser shows it), or end it"
                ) from None
            time.sleep(0.05)


def _is_locked(path: Path) -> bool:
    """Whether a living process holds the lock; a folder without a lock file is nobody's."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
