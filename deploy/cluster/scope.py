"""A run's folder in shared memory, and SIGTERM as a way to end a run."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import TextIO

from distill.errors import NO_VALUE, DistillError
from distill.replay.segments import FOLDER_PREFIX, sweep
from distill.run.inputs import shared_memory_root

CLAIM_TIMEOUT_S = 60.0
"""How long a driver waits while others claim their folders, which takes each of them moments."""
_DRIVER_LOCK = ".driver"
"""A file in the run's folder in shared memory, which the driver locks while it lives."""


class ClaimFailed(DistillError, RuntimeError):
    """A folder in shared memory that a driver could not claim in time."""

    code = "claim"


class SharedFolder:
    """The run's folder in shared memory.

    The driver holds a lock on a file in the folder, which the kernel releases when the process ends.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._path = shared_memory_root() / f"{FOLDER_PREFIX}{run_id}"

    def claim(self) -> None:
        """Create the folder, empty, and remove the folders of runs whose driver has ended.

        Raises: ClaimFailed.
        """
        root = shared_memory_root()
        # One driver at a time, because a folder looks abandoned between its creation and its lock.
        path = root / f".distill-claim-{os.getuid()}"
        with open(path, "w") as claiming:
            _lock(claiming, path)
            sweep(
                root,
                lambda run_id: (
                    run_id == self._run_id or _is_locked(root / f"{FOLDER_PREFIX}{run_id}" / _DRIVER_LOCK)
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
    """Makes SIGTERM raise KeyboardInterrupt, so that a run which a job scheduler ends cleans up as after Ctrl-C.

    It has no effect outside the main thread, which alone receives signals.
    """

    def __init__(self) -> None:
        self._previous = signal.getsignal(signal.SIGTERM)
        self.take()

    def take(self) -> None:
        """Install the handler; again after a library has installed its own."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous)


def _lock(file: TextIO, path: Path) -> None:
    """Lock a file. Raises: ClaimFailed after ``CLAIM_TIMEOUT_S``."""
    deadline = time.monotonic() + CLAIM_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ClaimFailed(
                    path, NO_VALUE, f"be free within {CLAIM_TIMEOUT_S:g} s (another driver has locked it)",
                    "find that process with fuser, and continue or end it",
                ) from None  # fmt: skip
            time.sleep(0.05)


def _is_locked(path: Path) -> bool:
    """Whether a living process holds the lock; False when there is no file."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
