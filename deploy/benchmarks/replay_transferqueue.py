"""TransferQueue's side of the benchmark ``replay``, in its environment of :mod:`deploy.benchmarks.replay_peers`.

It has the shape of the package's own performance test: a writer and a reader are Ray actors with a client each, and the
rows pass through its own SimpleStorage, with the two storage units that it recommends for one node. A batch of rows is
one TensorDict, which the writer puts into a partition of its own, as ``put`` demands; the reader fetches its metadata
and its data while the writer puts the next batch.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import time
from typing import Any, Self

from deploy.benchmarks.replay_rows import NUM_STATES, WIDTH, read_rows, start_private_ray, to_tensors, touch

_STORAGE_UNITS = 2
_OBJECT_STORE_BYTES = 100 << 20
"""The rows do not pass through Ray's object store."""


def _config() -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {
            "backend": {
                "storage_backend": "SimpleStorage",
                "SimpleStorage": {"num_data_storage_units": _STORAGE_UNITS},
            }
        }
    )


def _dense(field: Any) -> Any:
    """The numbers of a field, which the client may return as a nested tensor, in the order of the rows."""
    return field.values() if field.is_nested else field


class Writer:
    """The process that has the rows, and the test data of the package's own performance test."""

    def __init__(self, rows: str) -> None:
        import transfer_queue as tq

        tq.init(_config())
        self._client = tq.get_client()
        self._rows = to_tensors(read_rows(rows))
        self._own: Any = None

    def ready(self) -> None:
        pass

    def write(self, reader: Any, name: str, num_rows: int, batch: int) -> dict[str, Any]:
        """Send the first rows in batches; returns when this began, and the reader's last answer."""
        import ray
        from tensordict import TensorDict

        start = time.perf_counter()
        answers = []
        for first in range(0, num_rows, batch):
            size = min(batch, num_rows - first)
            columns = {key: column[first : first + size] for key, column in self._rows.items()}
            partition = f"{name}-{first}"
            self._client.put(TensorDict(columns, batch_size=[size]), partition_id=partition)
            answers.append(reader.read.remote(partition, list(columns), size))
        found: Any = ray.get(answers)
        return {"start": start, **found[-1]}

    def prepare_own(self, batch: int, fields: int, length: int) -> None:
        import torch
        from tensordict import TensorDict

        columns = {f"field_{number}": torch.randn(batch, length) for number in range(fields)}
        self._own = TensorDict(columns, batch_size=[batch])

    def write_own(self, reader: Any, name: str) -> dict[str, Any]:
        """One put, list and get of the performance test."""
        import ray
        import transfer_queue as tq

        start = time.perf_counter()
        keys = [f"test_key_{number}" for number in range(self._own.batch_size[0])]
        tq.kv_batch_put(keys=keys, partition_id=name, fields=self._own)
        return {"start": start, "end": ray.get(reader.read_own.remote(name))}

    def clear(self, partition: str) -> None:
        for found in self._client.get_partition_list():
            if found.startswith(partition):
                self._client.clear_partition(found)


class Reader:
    """The process that receives the rows."""

    def __init__(self) -> None:
        import transfer_queue as tq

        tq.init(_config())
        self._client = tq.get_client()
        self._sum = 0

    def ready(self) -> None:
        self._sum = 0

    def read(self, partition: str, fields: list[str], size: int) -> dict[str, Any]:
        meta = self._client.get_meta(
            data_fields=fields, batch_size=size, partition_id=partition, task_name="read"
        )
        rows = self._client.get_data(meta)
        self._sum += touch(_dense(rows["teacher_hidden"]).view(size, NUM_STATES, WIDTH))
        return {"end": time.perf_counter(), "sum": self._sum}

    def read_own(self, partition: str) -> float:
        import transfer_queue as tq

        keys = list(tq.kv_list(partition_id=partition)[partition])
        fields = tq.kv_batch_get(keys=keys, partition_id=partition)
        for name in fields.keys():  # noqa: SIM118 (a TensorDict iterates over its rows)
            _dense(fields[name]).flatten()[::1024].sum()  # one number per page
        return time.perf_counter()


class TransferQueue:
    """The engine of a :class:`deploy.benchmarks.side.Side`."""

    def __init__(self, writer: Any, reader: Any) -> None:
        self._writer = writer
        self._reader = reader
        self._num_rounds = 0

    @classmethod
    async def start(cls, rows: str) -> Self:
        import ray

        start_private_ray(_OBJECT_STORE_BYTES)
        actor: Any = ray.remote(num_cpus=0)
        writer = actor(Writer).remote(rows)
        ray.get(writer.ready.remote())  # it makes the controller and the storage, which the reader then finds
        return cls(writer, actor(Reader).remote())

    async def round(self, num_rows: int, batch: int) -> dict[str, Any]:
        """Move the first rows; returns the seconds and the sum of what was touched."""
        import ray

        name = self._name()
        ray.get(self._reader.ready.remote())
        found: Any = ray.get(self._writer.write.remote(self._reader, name, num_rows, batch))
        ray.get(self._writer.clear.remote(name))
        return {"seconds": found["end"] - found["start"], "sum": found["sum"]}

    async def prepare_own(self, batch: int, fields: int, length: int) -> None:
        """Make the data of :meth:`own`: fields [batch, length] of float32."""
        import ray

        ray.get(self._writer.prepare_own.remote(batch, fields, length))

    async def own(self) -> dict[str, Any]:
        import ray

        name = self._name()
        found: Any = ray.get(self._writer.write_own.remote(self._reader, name))
        ray.get(self._writer.clear.remote(name))
        return {"seconds": found["end"] - found["start"]}

    async def close(self) -> None:
        import ray

        ray.shutdown()

    def _name(self) -> str:
        self._num_rounds += 1
        return f"round{self._num_rounds}"
