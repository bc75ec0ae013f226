"""Peak memory of a run's processes, with shared pages counted once.

The measure of a process is its proportional set size (PSS): a page that three processes map adds a third
to each, so the sum over processes is memory in use. RSS would count a mapped replay segment once per
reader. Files in /dev/shm that no process maps at the moment are not included.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import psutil

Process = tuple[int, float]
"""(pid, time of creation): the system reuses pids."""


def pss_bytes(pid: int) -> int:
    """PSS of a process, or its RSS where the system does not reveal the PSS; 0 once it has ended."""
    try:
        process = psutil.Process(pid)
        try:
            memory = process.memory_full_info()
        except psutil.AccessDenied:
            memory = process.memory_info()
    except psutil.Error:
        return 0
    return getattr(memory, "pss", memory.rss)


class MemorySampler:
    """Samples named process trees every ``interval_s`` on a thread and keeps the peaks.

    ``roots``: name -> pid. A process belongs to its nearest ancestor among the roots, so a learner below
    the driver is not counted twice: ``driver`` covers the processes that no other root claims. Each sample
    looks for children anew. With the driver and, for a local Ray, the raylet and the GCS as roots, all
    worker and engine processes are included. A process that was seen once is followed after its parent's
    death, because an engine core that outlives its actor still uses memory.
    """

    def __init__(self, roots: Mapping[str, int], interval_s: float = 5.0):
        self._interval_s = interval_s
        self._roots: dict[int, str] = {}
        self._owner: dict[Process, str] = {}
        self._peaks: dict[str, int] = {"total": 0}
        self._newest: dict[str, int] = {}
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        for name, pid in roots.items():
            self.add(name, pid)

    def add(self, name: str, pid: int) -> None:
        """Follow one more tree; trees can share a name."""
        if name == "total":
            raise ValueError("name=total must differ from the sum's; choose another name")
        with self._guard:
            self._roots[pid] = name
            self._peaks.setdefault(name, 0)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_thread()

    def stop(self) -> dict[str, int]:
        """Take a last sample; returns the peaks."""
        self._stop_thread()
        self.sample()
        return self.peaks()

    def _stop_thread(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def peaks(self) -> dict[str, int]:
        """Bytes per name. ``total`` is the peak of the sum over all trees, hence at most the sum of the peaks."""
        with self._guard:
            return dict(self._peaks)

    def newest(self) -> dict[str, int]:
        """Bytes per name at the last sample; empty before the first. It does not wait for a sample under way."""
        return dict(self._newest)

    def sample(self) -> dict[str, int]:
        """Bytes per name at this moment."""
        with self._guard:
            self._owner = self._owners(_processes())
            now = dict.fromkeys(self._roots.values(), 0)
            for (pid, _), name in self._owner.items():
                now[name] = now.get(name, 0) + pss_bytes(pid)
            now["total"] = sum(now.values())
            for name, value in now.items():
                self._peaks[name] = max(self._peaks.get(name, 0), value)
            self._newest = now
            return dict(now)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.sample()
            self._stopped.wait(self._interval_s)

    def _owners(self, parents: Mapping[Process, int]) -> dict[Process, str]:
        """The name that each living process belongs to."""
        by_pid = {process[0]: process for process in parents}
        owners: dict[Process, str] = {}
        for process in parents:
            pid, line = process[0], set()
            while pid in by_pid and pid not in line:
                line.add(pid)
                if pid in self._roots:
                    owners[process] = self._roots[pid]
                    break
                pid = parents[by_pid[pid]]
            else:
                if process in self._owner:
                    owners[process] = self._owner[process]
        return owners


def _processes() -> dict[Process, int]:
    """Every process of this machine, with its parent's pid."""
    found: dict[Process, int] = {}
    for process in psutil.process_iter():
        try:
            with process.oneshot():
                found[(process.pid, process.create_time())] = process.ppid()
        except psutil.Error:
            continue
    return found
