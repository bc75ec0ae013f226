"""The virtual environment of TRL, which is no dependency of this project.

It is in the cache folder. It contains TRL only, and takes everything else from this environment, so both sides of the
comparison run the same builds of torch and transformers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from deploy.benchmarks.harness import BenchmarkFailed, Say
from deploy.fetch import cache_dir
from distill.errors import NO_VALUE

TRL_VERSION = "1.16.0"
_REQUIREMENT = f"trl=={TRL_VERSION}"
_TIMEOUT_S = 600.0


def trl_python(say: Say) -> Path:
    """The interpreter of the environment, which is made unless it exists.

    Raises: BenchmarkFailed, in one line, when TRL cannot be installed.
    """
    folder = cache_dir() / "benchmarks" / f"trl-{TRL_VERSION}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    ours = sysconfig.get_path("purelib")
    wanted = f"{_REQUIREMENT} {sys.version_info[:3]} {ours}\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"installing {_REQUIREMENT} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    (site_packages / "shared.pth").write_text(f"{ours}\n")
    # --ignore-installed: a development environment has TRL too, and pip would see that one.
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run([*pip, "--no-deps", "--ignore-installed", _REQUIREMENT])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _not_installed(str(error)) from error
    if found.returncode != 0:
        lines = (found.stderr or found.stdout).strip().splitlines()
        raise _not_installed(lines[-1] if lines else f"exit code {found.returncode}")


def _not_installed(reason: str) -> BenchmarkFailed:
    remedy = "check the network and pip's index; no other benchmark needs TRL"
    return BenchmarkFailed(f"installation of {_REQUIREMENT}", NO_VALUE, f"succeed ({reason})", remedy)
