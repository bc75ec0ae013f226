"""The peers of the benchmark ``replay`` in environments of their own, and the fastest batch of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deploy.benchmarks.harness import BenchmarkFailed, Say
from deploy.benchmarks.peer_environment import peer_python
from deploy.benchmarks.replay_rows import expected_touch, warm_memory
from deploy.benchmarks.side import Side

TRANSFERQUEUE_VERSION, TORCHRL_VERSION = "0.1.11", "0.14.0"
_TENSORDICT = (
    "tensordict==0.14.3",
    "pyvers==0.2.3",
    "orjson==3.13.0",
    "importlib_metadata==8.7.0",
    "zipp==3.23.0",
)
# TransferQueue names hydra-core too and imports nothing of it.
_REQUIREMENTS = {
    "transferqueue": (f"transferqueue=={TRANSFERQUEUE_VERSION}", *_TENSORDICT),
    "torchrl": (f"torchrl=={TORCHRL_VERSION}", "hoptorch==0.1.4", *_TENSORDICT),
}
VERSIONS = {"transferqueue": TRANSFERQUEUE_VERSION, "torchrl": TORCHRL_VERSION}
OWN_BATCH, OWN_FIELDS, OWN_LENGTH = 1024, 9, 8192
"""The small setting of TransferQueue's own performance test: 302 MB of float32, so nothing need be scaled."""


class Peer:
    """One peer's process with those below it."""

    def __init__(
        self, name: str, target: str, settings: dict[str, Any], rows: Path, folder: Path, say: Say
    ) -> None:
        """``settings``: of the engine. ``rows``: the folder of the rows. ``folder``: for :func:`warm_memory`."""
        python = peer_python(f"{name}-{VERSIONS[name]}", _REQUIREMENTS[name], say)
        self.name = name
        self.side = Side(name, target, {"rows": str(rows), **settings}, python=python)
        self._rows = rows
        self._folder = folder

    def round(self, num_rows: int, batch: int) -> dict[str, float]:
        """Move the first rows in batches; returns the seconds."""
        warm_memory(self._folder, num_rows)
        found = self.side.call("round", num_rows=num_rows, batch=batch)
        if found["sum"] != expected_touch(self._rows, num_rows):
            raise BenchmarkFailed(f"sum of what {self.name} read", found["sum"], "be that of the rows")
        return {"seconds": found["seconds"]}

    def own(self) -> dict[str, float]:
        """One cycle of TransferQueue's own performance test; returns the seconds."""
        warm_memory(self._folder, OWN_BATCH)
        return self.side.call("own")


def transfer_queue(rows: Path, folder: Path, say: Say) -> Peer:
    target = "deploy.benchmarks.replay_transferqueue:TransferQueue"
    peer = Peer("transferqueue", target, {}, rows, folder, say)
    peer.side.call("prepare_own", batch=OWN_BATCH, fields=OWN_FIELDS, length=OWN_LENGTH)
    return peer


def torchrl(rows: Path, folder: Path, num_rows: int, say: Say) -> Peer:
    target = "deploy.benchmarks.replay_torchrl:TorchRL"
    settings = {"folder": str(folder / "torchrl"), "num_rows": num_rows}
    return Peer("torchrl", target, settings, rows, folder, say)


def fastest_batch(
    round_of: Callable[[int], dict[str, float]], batches: Sequence[int], say: Say, name: str
) -> tuple[int, dict[str, float]]:
    """The batch with the least seconds after one round to warm up, and the seconds of each."""
    seconds: dict[str, float] = {}
    for batch in batches:
        say(f"{name} in batches of {batch}, to find its fastest")
        round_of(batch)
        seconds[str(batch)] = round_of(batch)["seconds"]
    return min(batches, key=lambda batch: seconds[str(batch)]), seconds
