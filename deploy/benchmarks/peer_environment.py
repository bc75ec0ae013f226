"""Virtual environments of peers, which are no dependencies of this project.

They are in the cache folder. Each contains one peer with the packages that this environment lacks, and takes everything
else from this environment, so both sides of a comparison run the same builds of torch, Ray and transformers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from deploy.benchmarks.harness import BenchmarkFailed, Say
from deploy.fetch import cache_dir
from distill.errors import NO_VALUE

TRL_VERSION = "1.16.0"
_TIMEOUT_S = 600.0


def trl_python(say: Say) -> Path:
    """The interpreter of TRL's environment (see :func:`peer_python`)."""
    return peer_python(f"trl-{TRL_VERSION}", [f"trl=={TRL_VERSION}"], say)


def peer_python(name: str, requirements: Sequence[str], say: Say) -> Path:
    """The interpreter of the environment ``name``, which is made unless it exists.

    ``requirements``: every package that it adds to this environment, each with its exact version. Their own
    requirements are not installed.

    Raises: BenchmarkFailed, in one line, when a package cannot be installed.
    """
    folder = cache_dir() / "benchmarks" / name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    ours = sysconfig.get_path("purelib")
    listed = " ".join(requirements)
    wanted = f"{listed} {sys.version_info[:3]} {ours}\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"installing {listed} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    _run(listed, [sys.executable, "-m", "venv", str(folder)])
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    (site_packages / "shared.pth").write_text(f"{ours}\n")
    # --ignore-installed: a development environment can have a peer too, and pip would see that one.
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run(listed, [*pip, "--no-deps", "--ignore-installed", *requirements])
    stamp.write_text(wanted)
    return python


def _run(listed: str, command: list[str]) -> None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _not_installed(listed, str(error)) from error
    if found.returncode != 0:
        lines = (found.stderr or found.stdout).strip().splitlines()
        raise _not_installed(listed, lines[-1] if lines else f"exit code {found.returncode}")


def _not_installed(listed: str, reason: str) -> BenchmarkFailed:
    remedy = "check the network and pip's index; only benchmarks that compare with a peer need it"
    return BenchmarkFailed(f"installation of {listed}", NO_VALUE, f"succeed ({reason})", remedy)
