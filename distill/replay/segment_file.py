"""The file of a segment while its writer appends to it, and the messages of which it consists.

It is written by ``pwritev`` and never through a mapping, because a mapping of a full medium ends the process by SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from distill.room import needs_room

ALIGNMENT = 64
"""Each message starts at a multiple of this, because Arrow copies buffers that are not aligned."""

_MAX_PARTS = 1024
"""Parts that the system writes in one call (IOV_MAX)."""


@dataclass
class OpenSegment:
    """A new file, which begins with its schema."""

    path: Path
    schema: pa.Schema
    size: int = 0
    num_rows: int = 0

    def __post_init__(self) -> None:
        """Create the file. Raises: NoSpace, and then no file is left."""
        with needs_room(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o600)
        try:
            self._write([self.schema.serialize()])
        except OSError:
            self.close()
            raise

    @property
    def name(self) -> str:
        return self.path.name

    def append(self, message: Sequence[pa.Buffer | bytes]) -> int:
        """Append a row; returns its offset. Raises: NoSpace, and then nothing is appended."""
        offset = self._write(message)
        self.num_rows += 1
        return offset

    def close(self) -> None:
        """Close the file, and remove it if it has no row."""
        os.close(self._descriptor)
        if self.num_rows == 0:
            self.path.unlink()

    def _write(self, message: Sequence[pa.Buffer | bytes]) -> int:
        """Append the parts of a message at the next aligned offset, all of them or none; returns the offset."""
        offset = -(-self.size // ALIGNMENT) * ALIGNMENT
        views = [memoryview(part) for part in message]
        done = first = 0
        try:
            with needs_room(self.path, sum(map(len, views))):
                while first < len(views):
                    written = os.pwritev(self._descriptor, views[first : first + _MAX_PARTS], offset + done)
                    done += written
                    while first < len(views) and written >= len(views[first]):
                        written -= len(views[first])
                        first += 1
                    if written:
                        views[first] = views[first][written:]
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            raise
        self.size = offset + done
        return offset


class RowMessages:
    """Makes the messages of the rows of one schema, in parts that refer to the rows' own memory.

    ``RecordBatch.serialize`` makes the same bytes, but copies a row's payload into new memory, whose pages cost more
    than the copy.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._parts: list[pa.Buffer | bytes] = []
        self._size = 0
        self._writer = pa.ipc.new_stream(pa.PythonFile(self, "w"), schema)
        self.of(pa.RecordBatch.from_pylist([], schema=schema))  # the first message follows that of the schema

    def of(self, row: pa.RecordBatch) -> list[pa.Buffer | bytes]:
        """The parts of a row's message, which keep its memory alive."""
        self._parts = []  # also of a row that failed
        self._writer.write_batch(row)
        parts, self._parts = self._parts, []  # otherwise the row's memory would stay until the next one
        return parts

    # The file that Arrow writes to

    closed = False

    def write(self, part: pa.Buffer | bytes) -> int:
        self._parts.append(part)
        self._size += len(part)
        return len(part)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
