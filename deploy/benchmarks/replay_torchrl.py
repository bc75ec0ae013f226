"""TorchRL's side of the benchmark ``replay``, in its environment of :mod:`deploy.benchmarks.replay_peers`.

The buffer is a ReplayBuffer on a LazyMemmapStorage with ``shared_init``, whose file is in shared memory: every process
maps the same pages, so that an insert copies once and a read copies nothing. The other shared forms copy more: a
RayReplayBuffer sends rows to an actor and samples back from it, and a LazyTensorStorage with ``shared_init`` is a
LazyMemmapStorage in the folder for temporary files. Rows are read by slices, which are views; ``sample`` would copy
them. The storage has room for one round and its pages exist from the second round on.

The buffer counts a row before it is written, so the writer tells the reader over a pipe when a batch is complete.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import time
from typing import Any, Self

from deploy.benchmarks.replay_rows import read_rows, to_tensors, touch


def _write(buffer: Any, rows: str, commands: Any, batches: Any) -> None:
    """The process that has the rows: a round per command, which is (number of rows, rows per batch)."""
    import torch
    from tensordict import TensorDict

    torch.set_num_threads(1)
    columns = to_tensors(read_rows(rows))
    commands.send("ready")
    while command := commands.recv():
        num_rows, batch = command
        start = time.perf_counter()
        for first in range(0, num_rows, batch):
            end = min(first + batch, num_rows)
            part = {name: column[first:end] for name, column in columns.items()}
            buffer.extend(TensorDict(part, batch_size=[end - first]))
            batches.send((first, end))
        batches.send(None)
        commands.send(start)


def _read(buffer: Any, commands: Any, batches: Any) -> None:
    """The process that receives the rows; it answers with the end of the last row and the sum of what it touched."""
    import torch

    torch.set_num_threads(1)
    commands.send("ready")
    while commands.recv():
        total, end = 0, 0.0
        while batch := batches.recv():
            total += touch(buffer[batch[0] : batch[1]]["teacher_hidden"])
            end = time.perf_counter()
        commands.send((end, total))


class TorchRL:
    """The engine of a :class:`deploy.benchmarks.side.Side`."""

    def __init__(self, writer: Any, reader: Any, processes: list[Any]) -> None:
        self._writer = writer
        self._reader = reader
        self._processes = processes

    @classmethod
    async def start(cls, rows: str, folder: str, num_rows: int) -> Self:
        import torch.multiprocessing as mp
        from torchrl.data import LazyMemmapStorage, ReplayBuffer

        context = mp.get_context("spawn")
        storage = LazyMemmapStorage(num_rows, scratch_dir=folder, shared_init=True, auto_cleanup=False)
        buffer = ReplayBuffer(storage=storage, batch_size=1, shared=True)
        writer, at_writer = context.Pipe()
        reader, at_reader = context.Pipe()
        receive, send = context.Pipe(duplex=False)
        processes = [
            context.Process(target=_write, args=(buffer, rows, at_writer, send), daemon=True),
            context.Process(target=_read, args=(buffer, at_reader, receive), daemon=True),
        ]
        for process, pipe in zip(processes, (writer, reader), strict=True):
            process.start()
            pipe.recv()
        return cls(writer, reader, processes)

    async def round(self, num_rows: int, batch: int) -> dict[str, Any]:
        """Move the rows, as many as the storage has room for; returns the seconds and the sum of what was touched."""
        self._reader.send(True)
        self._writer.send((num_rows, batch))
        start = self._writer.recv()
        end, total = self._reader.recv()
        return {"seconds": end - start, "sum": total}

    async def close(self) -> None:
        for pipe, process in zip((self._reader, self._writer), self._processes[::-1], strict=True):
            pipe.send(None)
            process.join(10)
