"""Runs pip and shows its progress, for deploy/setup.sh and deploy/fetch.py.

    python -m deploy.pip_progress install --no-deps -r requirements.txt

The pip of a Python 3.11 environment draws bars only on a terminal, one for each file and none for the installation,
and cannot report them to a program (`--progress-bar raw` came with pip 24.1). So this module reads the lines that
every pip prints, and looks at the files that it writes. It needs only the standard library.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

from deploy.live_line import State, live_line

_SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
_UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


class PipFailed(Exception):
    """pip ended with an error; the text is all that it wrote to stderr."""


class PipTimeout(Exception):
    """pip did not end in time."""


def run_pip(arguments: Sequence[str], num_packages: int, timeout_s: float | None = None) -> None:
    """Run a command of pip in this environment.

    ``num_packages``: the number of packages that it gets.

    Raises: PipFailed, PipTimeout.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        *arguments,
        "--progress-bar",
        "off",
    ]
    with (
        tempfile.TemporaryDirectory(prefix="distill-pip-") as downloads,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        environment = {**os.environ, "TMPDIR": downloads}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment
        )
        assert process.stdout is not None
        progress = _Progress(num_packages, Path(downloads))
        late = threading.Event()
        timer = threading.Timer(timeout_s or threading.TIMEOUT_MAX, lambda: (late.set(), process.kill()))
        timer.daemon = True
        timer.start()
        try:
            with live_line(progress.state):
                for line in process.stdout:
                    progress.read(line.strip())
                process.wait()
        finally:
            timer.cancel()
            process.kill()  # without effect unless an exception or Ctrl-C ended the loop
            process.stdout.close()
            process.wait()
        if late.is_set():
            raise PipTimeout
        if process.returncode != 0:
            errors.seek(0)
            raise PipFailed(errors.read())


class _Progress:
    """What pip is doing, according to the lines that it has printed. One thread reads them, another shows the state."""

    def __init__(self, num_packages: int, downloads: Path) -> None:
        self._downloads = downloads
        self._num_packages = num_packages
        self._num_started = 0
        self._doing = "starting pip"
        self._file = ""
        self._file_bytes = 0.0
        self._num_arrived = 0
        """Bytes of that file that have arrived."""
        self._installing: list[str] = []
        self._num_installed_before = 0
        self._lock = threading.Lock()

    def read(self, line: str) -> None:
        """Read one line of pip's stdout."""
        with self._lock:
            self._read(line)

    def state(self) -> State:
        """What to show now."""
        with self._lock:
            return self._state()

    def _read(self, line: str) -> None:
        if match := re.match(r"(Downloading|Using cached|Processing) (\S+)(?: \(([\d.]+) (\w+)\))?", line):
            verb, address, size, unit = match.groups()
            file = unquote(address).split("/")[-1]
            if not file.endswith(".metadata"):
                self._num_started += 1
                self._doing = f"downloading {_package(file)}"
                self._file, self._num_arrived = file, 0
                self._file_bytes = (
                    float(size) * _UNITS.get(unit, 0) if verb == "Downloading" and size else 0.0
                )
        elif line.startswith("Requirement already satisfied"):
            self._num_started += 1
        elif line.startswith("Installing collected packages: "):
            self._num_installed_before = _num_installed()
            self._installing = line.partition(": ")[2].split(", ")
        elif line.endswith(": started"):  # a source package: its dependencies, its metadata, its wheel
            self._doing = line.removesuffix(": started")

    def _state(self) -> State:
        if self._installing:
            num = len(self._installing)
            number = _num_installed() - self._num_installed_before
            number = min(max(0, number), num - 1)
            count = f" ({number + 1} of {num})" if num > 1 else ""
            return State(f"installing {self._installing[number]}{count}", number / num)
        if self._num_started == 0:
            return State(self._doing, 0.0)
        number = min(self._num_started, self._num_packages)
        count = f" ({number} of {self._num_packages})" if self._num_packages > 1 else ""
        text, share = f"{self._doing}{count}", 1.0
        if self._file_bytes:
            self._num_arrived = max(self._num_arrived, self._size())
            done = min(self._num_arrived, self._file_bytes)
            share = done / self._file_bytes
            if self._file_bytes >= 1e6:
                text += f", {done / 1e6:.1f} of {self._file_bytes / 1e6:.1f} MB"
        return State(text, (number - 1 + share) / self._num_packages)

    def _size(self) -> int:
        """Bytes of the current file that have arrived; 0 when pip has moved it away already."""
        with suppress(FileNotFoundError):
            for path in self._downloads.glob(f"*/{self._file}"):
                return path.stat().st_size
        return 0


def _package(file: str) -> str:
    """The name of the package in the name of its archive."""
    return re.split(r"-\d|\.tar\.|\.zip", file)[0].replace("_", "-")


def _num_installed() -> int:
    # pip writes this file of a package last.
    return sum(1 for _ in _SITE_PACKAGES.glob("*.dist-info/INSTALLER"))


def _num_requirements(arguments: Sequence[str]) -> int:
    """The number of packages in the requirement files among pip's arguments; 1 for a command without one."""
    files = [Path(file) for option, file in itertools.pairwise(arguments) if option == "-r"]
    lines = [line for file in files for line in file.read_text().splitlines()]
    return sum(1 for line in lines if line.strip() and not line.startswith("#")) or 1


def main(arguments: Sequence[str]) -> int:
    """Run a command of pip; returns the exit code. What pip wrote to stderr appears only when it fails."""
    try:
        run_pip(arguments, _num_requirements(arguments))
    except PipFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # Die by the signal, without a traceback, so that the shell script that waits for this process ends too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
