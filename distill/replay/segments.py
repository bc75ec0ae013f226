"""The segment store: rows as Arrow messages in append-only files that readers map.

A file belongs to one writer, whose id is never used again, so a name never stands for other bytes. It starts in
shared memory and moves to the spill folder when the node exceeds its bound; where shared memory is full, it starts in
the spill folder. A message is written before its row is announced, and a file outlives its writer, so one mechanism serves
zero-copy reads, spilling and restarts.

    memory_dir/<writer_id>-<k>.arrow:  schema message | pad | record batch | pad | record batch ...
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from distill.errors import NO_VALUE, DistillError
from distill.files import replacing_file
from distill.interfaces import Draw, Location, SampleRef, SegmentMissing
from distill.replay.locations import require_location, require_segment_name, row_in, schema_in
from distill.replay.segment_file import OpenSegment, RowMessages
from distill.room import NoSpace
from distill.schema import oldest_version

MAX_OPEN_MAPS = 64
"""Bounded because a map keeps its file's memory alive after the file has moved to disk or was deleted."""

RETRY_S = 1.0
"""Seconds between two attempts to write a row for which no medium had room."""

FOLDER_PREFIX = "distill-"
"""A run's folder in shared memory has this prefix and the run id as its name; its segments are below it."""


class RemoteSegment(DistillError, RuntimeError):
    """A row on another node, which cannot be fetched yet."""

    code = "remote_segment"


def sweep(root: Path, alive: Callable[[str], bool]) -> list[Path]:
    """Remove the folders of runs that are not ``alive(run_id)``; returns them.

    It touches only this user's folders with :data:`FOLDER_PREFIX` and follows no links.
    """
    removed: list[Path] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        ours = entry.name.startswith(FOLDER_PREFIX) and entry.is_dir(follow_symlinks=False)
        if not ours or entry.stat(follow_symlinks=False).st_uid != os.getuid():
            continue
        if not alive(entry.name.removeprefix(FOLDER_PREFIX)):
            shutil.rmtree(entry.path, ignore_errors=True)
            removed.append(Path(entry.path))
    return removed


@dataclass(frozen=True)
class _Map:
    """A file as one buffer, whose slices keep the mapping alive."""

    path: Path
    buffer: pa.Buffer
    schema: pa.Schema


class SegmentStore:
    """Writes the segment files of one writer and reads those of every writer on this node.

    ``memory_bytes`` bounds the files of all writers in ``memory_dir``; each writer moves its own
    files when the sum exceeds it. Any thread may call any method; threads that write take turns.
    """

    def __init__(
        self,
        memory_dir: Path,
        spill_dir: Path,
        writer_id: str,
        node: str,
        segment_bytes: int,
        memory_bytes: int,
        wait_for_room_s: float = 0.0,
    ) -> None:
        """``wait_for_room_s``: how long :meth:`append` waits while neither medium has room."""
        self._memory_dir = Path(memory_dir)
        self._spill_dir = Path(spill_dir)
        self._writer_id = writer_id
        self._node = node
        self._segment_bytes = segment_bytes
        self._memory_bytes = memory_bytes
        self._wait_for_room_s = wait_for_room_s
        # Rows contain users' prompts, and every user of the machine can list /dev/shm.
        self._memory_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._spill_dir.mkdir(parents=True, exist_ok=True)
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._open: OpenSegment | None = None
        self._messages: RowMessages | None = None
        """For the schema that was written last."""
        self._number = 0
        self.num_appended_bytes = 0
        """Of all rows so far."""
        self.num_diverted = 0
        """Segments that started on the disk, because shared memory had no room for a row."""
        self._in_memory: list[str] = []
        """Sealed segments in shared memory, oldest first."""
        self._has_new_sealed = False
        """Whether a segment was sealed since the bound was looked at, which takes a look at every file."""
        self._unsettled: Counter[str] = Counter()
        """Per segment: rows of which the replay index does not know yet whether it needs them."""
        self._maps: OrderedDict[str, _Map] = OrderedDict()

    def append(self, draw: Draw, sample: int, row: pa.RecordBatch) -> SampleRef:
        """Write one row as one message, which survives the death of this process.

        Arrow writes only the values that the batch refers to, so a slice is written without the
        rest of its parent.

        It waits for room, for ``wait_for_room_s`` at most.

        Raises: NoSpace when neither medium has room; then nothing is written.
        """
        deadline = time.monotonic() + self._wait_for_room_s
        while True:
            try:
                with self._writing:
                    name, offset, num_bytes = self._append(row)
                break
            except NoSpace:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(min(RETRY_S, self._wait_for_room_s))
        return SampleRef(
            draw=draw,
            sample=sample,
            location=Location(
                node=self._node,
                segment=name,
                offset=offset,
                num_bytes=num_bytes,
                trajectory_id=row.column("trajectory_id")[0].as_py(),
            ),
            num_tokens=len(row.column("response_tokens").flatten()),
            oldest_version=oldest_version(row),
        )

    def read(self, sample: SampleRef) -> pa.RecordBatch:
        """Map a row without copying; the batch keeps the mapping alive.

        Raises: SegmentMissing when its segment is gone, or another row is in its place; RemoteSegment when it is
        on another node; ForeignLocation for what can be no location.
        """
        location = sample.location
        require_location(location)
        if location.node != self._node:
            raise RemoteSegment(
                "location.node",
                location.node,
                f"be this node ({self._node}), because segments cannot be fetched from other nodes yet",
                "run all roles on one node",
            )
        with self._reading:
            segment = self._map(location.segment, location.offset + location.num_bytes)
        row, found = row_in(segment.buffer.slice(location.offset, location.num_bytes), segment.schema)
        if row is None or found != location.trajectory_id:
            raise SegmentMissing(
                f"row in segment {location.segment} at {location.offset}",
                NO_VALUE if row is None else found,
                f"be {location.trajectory_id}{' (the bytes there are no row)' if row is None else ''}",
                "resume from the newest checkpoint",
            )
        return row

    def settle(self, samples: Sequence[SampleRef]) -> None:
        """Record that the replay index knows these rows of this writer, or that they will not be needed."""
        with self._writing:
            for sample in samples:
                if (
                    sample.location.segment in self._unsettled
                ):  # not a row that stays where another writer put it
                    self._unsettled[sample.location.segment] -= 1

    def settled_segments(self) -> list[str]:
        """Return this writer's closed segments in which no row is waiting to be announced.

        None of them will contain a live row again once it contains none.
        """
        with self._writing:
            names = [name for name, num_rows in self._unsettled.items() if num_rows == 0]
            return [name for name in names if self._open is None or self._open.name != name]

    def delete(self, names: Collection[str]) -> None:
        """Delete segments, which are settled and contain no live row.

        Raises: ForeignLocation for a name that leads out of the folders of segments; then nothing is deleted.
        """
        for name in names:
            require_segment_name(name)
        with self._writing:
            for name in names:
                for folder in (self._memory_dir, self._spill_dir):
                    (folder / name).unlink(missing_ok=True)
                self._unsettled.pop(name, None)
                if name in self._in_memory:
                    self._in_memory.remove(name)
        with self._reading:
            for name in names:
                self._maps.pop(name, None)

    # Writing

    def _message(self, row: pa.RecordBatch) -> list[pa.Buffer | bytes]:
        if self._messages is None or not self._messages.schema.equals(row.schema, check_metadata=True):
            self._messages = RowMessages(row.schema)
        return self._messages.of(row)

    def _append(self, row: pa.RecordBatch) -> tuple[str, int, int]:
        """Write a row; returns its segment, offset and size. Raises: NoSpace."""
        message = self._message(row)
        num_bytes = sum(len(part) for part in message)
        try:
            segment = self._segment_for(row.schema, num_bytes, self._memory_dir)
            offset = segment.append(message)
        except NoSpace:
            self._seal()
            segment, offset = self._divert(row.schema, message)
        if segment.size >= self._segment_bytes:
            self._seal()
        if self._has_new_sealed:
            self._spill()
        self._unsettled[segment.name] += 1
        self.num_appended_bytes += num_bytes
        return segment.name, offset, num_bytes

    def _divert(self, schema: pa.Schema, message: Sequence[pa.Buffer | bytes]) -> tuple[OpenSegment, int]:
        """Begin a segment on the disk with a row; the next segment is tried in memory again. Raises: NoSpace."""
        try:
            segment = self._segment_for(schema, 0, self._spill_dir)
            offset = segment.append(message)
        except NoSpace:
            self._seal()
            raise
        self.num_diverted += 1
        return segment, offset

    def _segment_for(self, schema: pa.Schema, num_bytes: int, folder: Path) -> OpenSegment:
        """The open segment, or else a new one in ``folder``. Raises: NoSpace."""
        segment = self._open
        if segment is not None:
            full = segment.size + num_bytes > self._segment_bytes
            if full or not segment.schema.equals(schema, check_metadata=True):
                self._seal()
        if self._open is None:
            name = f"{self._writer_id}-{self._number}.arrow"
            self._number += 1
            self._open = OpenSegment(folder / name, schema)
            self._unsettled[name] = 0
        return self._open

    def _seal(self) -> None:
        segment, self._open = self._open, None
        if segment is None:
            return
        segment.close()
        if segment.num_rows == 0:
            del self._unsettled[segment.name]
        elif segment.path.parent == self._memory_dir:
            self._in_memory.append(segment.name)
            self._has_new_sealed = True

    def _spill(self) -> None:
        """Move this writer's oldest sealed segments to disk while the node exceeds its bound, and the disk has room."""
        self._has_new_sealed = False
        while self._in_memory and _folder_bytes(self._memory_dir) > self._memory_bytes:
            name = self._in_memory[0]
            # In this order a reader always finds it in one of the two folders. Nothing waits for the
            # disk, because a spilled segment must outlive this process but not the machine.
            try:
                with replacing_file(self._spill_dir / name, durable=False) as temporary:
                    shutil.copyfile(self._memory_dir / name, temporary)
            except NoSpace:  # it stays where it is until the next one is sealed
                return
            (self._memory_dir / name).unlink()
            del self._in_memory[0]

    # Reading

    def _map(self, name: str, end: int) -> _Map:
        known = self._maps.get(name)
        if known is None or known.buffer.size < end or not known.path.exists():
            self._drop_maps_of_moved_files()
            known = self._open_map(name)
            self._maps[name] = known
        self._maps.move_to_end(name)
        while len(self._maps) > MAX_OPEN_MAPS:
            self._maps.popitem(last=False)
        if known.buffer.size < end:
            raise SegmentMissing(
                f"size of segment {name} in {known.path.parent}", f"{known.buffer.size} bytes",
                f"be >= {end} bytes, where the row ends; the file was cut", "resume from the newest checkpoint",
            )  # fmt: skip
        return known

    def _drop_maps_of_moved_files(self) -> None:
        for name, known in list(self._maps.items()):
            if not known.path.exists():
                del self._maps[name]

    def _open_map(self, name: str) -> _Map:
        for folder in (self._memory_dir, self._spill_dir):
            try:
                file = pa.memory_map(str(folder / name))
            except FileNotFoundError:
                continue
            buffer = file.read_buffer()
            schema = schema_in(buffer)
            if schema is None:
                raise SegmentMissing(
                    f"segment {name} in {folder}",
                    NO_VALUE,
                    "begin with the schema of a row, as its writer began it",
                    "resume from the newest checkpoint",
                )
            return _Map(folder / name, buffer, schema)
        raise SegmentMissing(
            f"segment {name}",
            NO_VALUE,
            f"be in {self._memory_dir} or {self._spill_dir}; its run was swept, or its rows were no longer needed",
            "resume from the newest checkpoint",
        )


def _folder_bytes(folder: Path) -> int:
    """Return the bytes of all files of every writer; a file that vanishes meanwhile counts 0."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_size
        except FileNotFoundError:
            continue
    return total
