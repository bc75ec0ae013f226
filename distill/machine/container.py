"""The memory that the control group of this process, a container's or a job's, leaves it, and whom the kernel has killed.

Both versions of control groups are read, each group with those above it. Files in shared memory count as memory of the
group that wrote them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class MemoryLimit:
    """A control group that bounds memory."""

    num_bytes: int
    free_bytes: int
    """What its processes can still take, with the cache of files that the kernel would give up for it."""


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """The limit that leaves this process least; None where none is set. ``root``: of the file system, for tests."""
    found = [limit for group in _groups(root) if (limit := _limit(group)) is not None]
    return min(found, key=lambda limit: limit.free_bytes, default=None)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process and its children can still take: of the machine, and within the limit."""
    available: int = psutil.virtual_memory().available
    limit = memory_limit(root)
    return available if limit is None else min(available, limit.free_bytes)


def num_killed(root: Path = Path("/")) -> int | None:
    """How many processes the kernel has killed for lack of memory, in the own control group or else on the machine.

    None where the system does not count them.
    """
    for group in _groups(root):
        for name in ("memory.events", "memory.oom_control"):
            if (count := _fields(group / name).get("oom_kill")) is not None:
                return count
    return _fields(root / "proc/vmstat").get("oom_kill")


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the memory group of this process, and of those above it.

    In a container, the path in /proc can be the host's, of which only the mounted part is visible.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = mount / path.lstrip("/")
        yield from (each for each in (group, *group.parents) if each.is_relative_to(mount) and each.is_dir())


def _limit(group: Path) -> MemoryLimit | None:
    for limit, usage, inactive in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        bound, used = _text(group / limit).strip(), _text(group / usage).strip()
        # Without a limit, version 2 has "max" and version 1 a number near 2^63.
        if bound.isdecimal() and used.isdecimal() and int(bound) < 1 << 60:
            cache = _fields(group / "memory.stat").get(inactive, 0)
            return MemoryLimit(int(bound), max(0, int(bound) - int(used) + cache))
    return None


def _fields(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except OSError:
        return ""
