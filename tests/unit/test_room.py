"""A full medium is one error with free and needed bytes, and nothing half-written is left."""

from __future__ import annotations

import errno
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.files import LineFile, LineReader, new_folder, replacing_file, write_bytes
from distill.room import IN_CACHE, NoSpace, advising, needs_room
from distill.run.ledger_file import LedgerFile, LedgerReader, LedgerStart
from distill.run.metrics import EventLog, MetricsWriter, read_events, read_metrics
from tests.media import fill, mounted


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow further, which the system says as it says that a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "small", 256 << 10) as folder:
        yield folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The error


def test_the_error_names_file_need_free_bytes_and_remedy(small: Path) -> None:
    fill(small)
    with pytest.raises(
        NoSpace,
        match=rf"^free space for {small}/a=0 bytes must be >= 3\.0 MiB; free some there or lower checkpoint\.keep; then resume the run$",
    ):
        write_bytes(small / "a", bytes(3 << 20))


@pytest.mark.parametrize(
    ("number", "path", "text"),
    [
        (errno.ENOSPC, "/dev/shm/x", r"^free space for /dev/shm/x=.* must be enough for it; give the container a larger /dev/shm"),
        (errno.EDQUOT, "/tmp/x", r"^the user's quota for /tmp/x must be enough for it; raise it, or free some"),
        (errno.EFBIG, "/tmp/x", r"^size of /tmp/x must be within the system's limit on the size of a file; raise the limit \(ulimit -f\)"),
    ],
)  # fmt: skip
def test_each_way_to_be_full_has_its_remedy(number: int, path: str, text: str) -> None:
    with pytest.raises(NoSpace, match=text), needs_room(path):
        raise OSError(number, os.strerror(number))


def test_a_library_that_names_the_systems_error_in_its_text_is_understood(small: Path) -> None:
    with pytest.raises(NoSpace), needs_room(small / "a"):
        save_file({"a": torch.zeros(1 << 20)}, small / "a")


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), needs_room(tmp_path):
        raise PermissionError(errno.EPERM, "no")
    with pytest.raises(ValueError, match="os error 2"), needs_room(tmp_path):
        raise ValueError("absent (os error 2)")


def test_a_file_system_without_inodes_is_told_from_one_without_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    fields = list(real)
    fields[5:8] = 100, 0, 0
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    assert str(NoSpace.of(errno.ENOSPC, tmp_path)).startswith(
        f"free inodes for {tmp_path}=0 must be >= 1; delete files"
    )


def test_it_crosses_processes_and_takes_an_actors_name() -> None:
    error = NoSpace.of(errno.ENOSPC, Path("/tmp/x"), 5)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.errno, copy.parts()) == (str(error), errno.ENOSPC, error.parts())
    named = error.within("learner")
    assert isinstance(named, NoSpace)
    assert str(named) == f"learner: {error}"


def test_the_cache_has_its_own_remedy() -> None:
    with (
        pytest.raises(NoSpace, match=r"^free space for /tmp/x=.*; free some there or set DISTILL_CACHE"),
        advising(IN_CACHE),
    ):
        raise NoSpace.of(errno.ENOSPC, Path("/tmp/x"))


# Files and folders


def test_a_file_that_does_not_fit_leaves_the_old_one(small: Path) -> None:
    write_bytes(small / "a", b"old")
    with pytest.raises(NoSpace):
        write_bytes(small / "a", bytes(1 << 20))
    with pytest.raises(NoSpace), replacing_file(small / "a") as temporary, temporary.open("wb") as file:
        file.write(bytes(1 << 20))
    assert names(small) == ["a"]
    assert (small / "a").read_bytes() == b"old"


def test_a_limit_on_the_size_of_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    with file_size_limit(4096), pytest.raises(NoSpace, match="ulimit"):
        write_bytes(tmp_path / "a", bytes(8192))
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_does_not_fit_leaves_the_old_one(small: Path) -> None:
    with new_folder(small / "a") as making:
        (making / "x").write_bytes(b"old")
    with (
        pytest.raises(NoSpace, match=r"must be >= 1\.0 MiB"),
        new_folder(small / "a", num_bytes=1 << 20) as making,
    ):
        (making / "x").write_bytes(bytes(128 << 10))
        (making / "y").write_bytes(bytes(1 << 20))
    assert names(small) == ["a"]
    assert (small / "a" / "x").read_bytes() == b"old"


# Files of lines


def test_a_line_that_is_half_written_is_cut_off_again(small: Path) -> None:
    lines = LineFile(small / "lines")
    lines.append('"first"')
    size = lines.num_bytes
    filling = fill(small, leave=8192)
    with pytest.raises(NoSpace):
        lines.append(f'"{"x" * 50_000}"')
    assert lines.num_bytes == size
    filling.unlink()
    lines.append('"second"')
    reader = LineReader(small / "lines", lambda value: [value])
    assert (list(reader), reader.num_broken) == (["first", "second"], 0)


def test_a_line_that_is_cut_off_takes_no_line_of_another_writer_along(small: Path) -> None:
    first, second = LineFile(small / "lines"), LineFile(small / "lines")
    first.append("1")
    second.append("2")
    fill(small, leave=4096)
    with pytest.raises(NoSpace):
        first.append(f'"{"x" * 50_000}"')
    second.append("3")
    assert list(LineReader(small / "lines", lambda value: [value])) == [1, 2, 3]


def test_the_ledger_says_what_has_no_room_and_is_whole(small: Path) -> None:
    ledger = LedgerFile(small / "ledger.jsonl", 1, {"student_text": 3, "teacher_text": 2})
    ledger.start(0)
    filling = fill(small)
    with pytest.raises(NoSpace, match="ledger"):
        for _ in range(100):  # until the last page of the file is full
            ledger.start(7)
    filling.unlink()
    ledger.start(9)
    reader = LedgerReader(small / "ledger.jsonl")
    found = [entry.updates_done for entry in reader if isinstance(entry, LedgerStart)]
    assert (found[0], found[-1], reader.num_broken) == (0, 9, 0)


def test_events_wait_for_room_in_their_order(small: Path) -> None:
    log = EventLog(small)
    log.write("first")
    filling = fill(small)
    texts = [f"{number}" * 5000 for number in range(3)]
    for text in texts:
        log.write("later", text=text)
    assert [event["event"] for event in read_events(small)] == ["first"]
    filling.unlink()
    log.write("last")
    log.close()
    assert [event.get("text") for event in read_events(small)] == [None, *texts, None]


def test_rows_of_metrics_wait_in_memory_for_room(small: Path) -> None:
    now = [0.0]
    writer = MetricsWriter(small, clock=lambda: now[0])
    writer.write(1, {"policy/tv": 1.0})
    writer.flush()
    filling = fill(small)
    for update in (2, 3):
        now[0] += 1000
        writer.write(update, {"policy/tv": float(update)})
    with pytest.raises(NoSpace, match=r"metrics\.parquet"):
        writer.flush()
    assert read_metrics(small)["update"].to_pylist() == [1]
    filling.unlink()
    writer.flush()
    assert read_metrics(small)["policy/tv"].to_pylist() == [1.0, 2.0, 3.0]
