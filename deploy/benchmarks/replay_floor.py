"""What the benchmark ``replay`` compares with and needs no other package: a memory copy, and pickled rows in Ray.

``memcpy`` is the physical floor. One process copies the states from its memory into a file in shared memory whose pages
exist, in one call, and then another maps the file and reads it. ``pickle`` puts lists of rows, each a dictionary of
arrays, into Ray's object store, whose readers map the arrays without copying. The next list is put while the receiver
reads the last one.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from deploy.benchmarks.harness import BenchmarkFailed
from deploy.benchmarks.replay_rows import (
    NUM_STATES,
    STATE_BYTES,
    WIDTH,
    expected_touch,
    read_rows,
    touch,
    warm_memory,
)

OBJECT_STORE_BYTES = 2 << 30
"""Room for the rows of two rounds."""


class Sender:
    """The process that has the rows."""

    def __init__(self, rows: str) -> None:
        self._columns = read_rows(rows)

    def pid(self) -> int:
        return os.getpid()

    def make_file(self, path: str, num_rows: int) -> None:
        """Map a file for :meth:`copy`, and touch its pages."""
        self._target = np.memmap(path, np.uint16, "w+", shape=(num_rows, NUM_STATES, WIDTH))
        self._target.fill(1)

    def copy(self) -> dict[str, float]:
        """Copy the states into the file."""
        start = time.perf_counter()
        np.copyto(self._target, self._columns["teacher_hidden"][: len(self._target)])
        return {"start": start, "seconds": time.perf_counter() - start}

    def put(self, receiver: Any, num_rows: int, rows_per_list: int) -> dict[str, Any]:
        """Send the first rows as lists; returns when this began, when the last was read, and the sum."""
        import ray

        start = time.perf_counter()
        answers = []
        for first in range(0, num_rows, rows_per_list):
            parts = {name: column[first : first + rows_per_list] for name, column in self._columns.items()}
            rows = [
                {name: part[row] for name, part in parts.items()}
                for row in range(len(parts["teacher_hidden"]))
            ]
            answers.append(receiver.take.remote([ray.put(rows)]))
        found: Any = ray.get(answers)
        return {
            "start": start,
            "end": max(each["end"] for each in found),
            "sum": sum(each["sum"] for each in found),
        }


class Receiver:
    """The process that reads."""

    def __init__(self) -> None:
        import warnings

        import torch  # noqa: F401 (before the clock runs)

        # A mapped array cannot be written to, and nothing here writes.
        warnings.filterwarnings("ignore", "The given (NumPy array|buffer) is not writable")

    def pid(self) -> int:
        return os.getpid()

    def map(self, path: str) -> dict[str, float]:
        """Map a file of states and read it."""
        import torch

        start = time.perf_counter()
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            bits = np.frombuffer(memory, np.uint16).reshape(-1, NUM_STATES, WIDTH)
            total = touch(torch.from_numpy(bits).view(torch.bfloat16))
            seconds = time.perf_counter() - start
            del bits  # it would keep the map open
        return {"sum": total, "seconds": seconds}

    def take(self, references: list[Any]) -> dict[str, Any]:
        """Read one list, beside others; returns when it was read, and the sum of what was touched."""
        import ray
        import torch

        total = 0
        rows: Any = ray.get(references[0])
        for row in rows:
            total += touch(torch.from_numpy(row["teacher_hidden"]).view(torch.bfloat16))
        return {"end": time.perf_counter(), "sum": total}


class Floors:
    """The driver's end: two Ray actors that live for all rounds."""

    def __init__(self, cluster: Any, rows: Path, folder: Path) -> None:
        """``cluster``: a :class:`deploy.cluster.ray_cluster.RayCluster` that is open."""
        self._cluster = cluster
        self._rows = rows
        self._folder = folder
        self._sender = cluster.start_actor("sender", Sender, str(rows), num_threads=1)
        self._receiver = cluster.start_actor("receiver", Receiver, num_threads=1)

    def memcpy(self, num_rows: int) -> dict[str, float]:
        """Copy, then map. The time in which the driver learns of the copy does not count."""
        path = self._folder / "states"
        if not path.exists():
            self._call("sender", self._sender.make_file.remote(str(path), num_rows))
        copied = self._call("sender", self._sender.copy.remote())
        mapped = self._call("receiver", self._receiver.map.remote(str(path)))
        self._check("memcpy", mapped["sum"], num_rows)
        return {
            "seconds": copied["seconds"] + mapped["seconds"],
            "copy_s": copied["seconds"],
            "map_s": mapped["seconds"],
            "num_bytes": num_rows * STATE_BYTES,
        }

    def pickle(self, num_rows: int, rows_per_list: int) -> dict[str, float]:
        """Send lists through the object store."""
        warm_memory(self._folder, num_rows)
        found = self._call("sender", self._sender.put.remote(self._receiver, num_rows, rows_per_list))
        self._check("pickle", found["sum"], num_rows)
        return {"seconds": found["end"] - found["start"]}

    def pss_bytes(self) -> int:
        """Memory of sender and receiver between two rounds."""
        from deploy.cluster.memory import pss_bytes

        return sum(pss_bytes(self._cluster.actor_pid(name)) for name in ("sender", "receiver"))

    def _call(self, name: str, call: Any) -> Any:
        return self._cluster.wait({name: call}, interval_s=0.2)[name]

    def _check(self, name: str, total: int, num_rows: int) -> None:
        if total != expected_touch(self._rows, num_rows):
            raise BenchmarkFailed(f"sum of what {name} read", total, "be that of the rows")
