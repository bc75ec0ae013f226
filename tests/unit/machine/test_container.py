"""The memory limit of a container, in both versions of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distill.machine import container
from distill.machine.container import MemoryLimit, available_memory, memory_limit, num_killed

GIB = 1 << 30


def system(root: Path, cgroup: str, **files: str) -> Path:
    """A file system with these files below sys/fs/cgroup, whose names have __ for /."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/vmstat").write_text("nr_free_pages 5\noom_kill 9\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n"


def test_version_2_within_a_container(tmp_path: Path) -> None:
    stat = f"anon 5\ninactive_file {GIB}\n"
    root = system(tmp_path, "0::/\n", memory_DOT_max=f"{8 * GIB}\n", memory_DOT_current=f"{3 * GIB}\n",
                  memory_DOT_stat=stat, memory_DOT_events="oom 4\noom_kill 2\n")  # fmt: skip
    assert memory_limit(root) == MemoryLimit(8 * GIB, 6 * GIB)
    assert num_killed(root) == 2


def test_version_2_takes_the_tightest_of_the_groups_above(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/job/step\n", job__step__memory_DOT_max="max\n", job__step__memory_DOT_current="5\n",
                  job__memory_DOT_max=f"{4 * GIB}\n", job__memory_DOT_current=f"{GIB}\n", memory_DOT_stat="")  # fmt: skip
    assert memory_limit(root) == MemoryLimit(4 * GIB, 3 * GIB)


@pytest.mark.parametrize("group", ["memory__docker__abc__", "memory__"])
def test_version_1_whether_the_path_is_the_hosts_or_the_containers(tmp_path: Path, group: str) -> None:
    files = {f"{group}memory_DOT_limit_in_bytes": f"{2 * GIB}\n", f"{group}memory_DOT_usage_in_bytes": f"{GIB}\n",
             f"{group}memory_DOT_stat": "total_inactive_file 0\n",
             f"{group}memory_DOT_oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}  # fmt: skip
    root = system(tmp_path, V1, **files)
    assert memory_limit(root) == MemoryLimit(2 * GIB, GIB)
    assert num_killed(root) == 3


def test_without_a_limit_the_machine_decides(tmp_path: Path) -> None:
    root = system(tmp_path, V1, memory__memory_DOT_limit_in_bytes="9223372036854771712\n",
                  memory__memory_DOT_usage_in_bytes="5\n")  # fmt: skip
    assert memory_limit(root) is None
    assert num_killed(root) == 9, "of the machine"
    assert available_memory(root) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    assert num_killed(tmp_path) is None


def test_the_limit_bounds_what_is_available(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/\n", memory_DOT_max="5000\n", memory_DOT_current="6000\n")
    assert available_memory(root) == 0


@pytest.fixture
def group() -> Iterator[Path]:
    """A real group of 64 MiB below that of this process."""
    folder = next(container._groups(Path("/")), Path("/nowhere")) / f"distill-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error})")
    try:
        limit = "memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes"
        (folder / limit).write_text(str(64 << 20))
        yield folder
    finally:
        folder.rmdir()


def test_a_process_that_the_kernel_kills_is_counted(group: Path) -> None:
    code = """
import subprocess, sys
from distill.machine.container import memory_limit, num_killed
before = num_killed()
died = subprocess.run([sys.executable, "-c", "x = bytearray(200 << 20)"]).returncode
print(memory_limit().num_bytes, died, num_killed() - before)
"""
    enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", enter, "-", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == [str(64 << 20), "-9", "1"], done.stderr
