"""What writers that were killed leave has names by which it is found and deleted, and by nothing else."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys

import pytest

from distill import files
from distill.files import is_temporary, new_folder, remove_temporaries, write_bytes
from tests.unit.test_files import filled, names


@pytest.fixture
def same_numbers(monkeypatch):
    """Restarts the numbers of temporary names, as in a new process with the pid of a dead one."""

    def restart() -> None:
        monkeypatch.setattr(files, "_numbers", itertools.count())

    restart()
    return restart


HALF = """
import os, signal, sys, pathlib
from distill.files import new_folder, replacing_file
folder = pathlib.Path(sys.argv[1])
with replacing_file(folder / "file") as file, new_folder(folder / "folder") as making:
    file.write_text("half")
    (making / "text").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_old_files_and_temporary_names(tmp_path):
    (tmp_path / "file").write_text("old")
    filled(tmp_path / "folder", "old")
    done = subprocess.run([sys.executable, "-c", HALF, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "text").read_text() == "old"
    left = [name for name in names(tmp_path) if name not in ("file", "folder")]
    assert len(left) == 2 and all(is_temporary(name) for name in left)
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["file", "folder"]


def test_temporary_names_of_a_dead_process_with_the_same_pid_are_skipped(tmp_path, same_numbers):
    """In a container a restarted process often has the pid of the one that died."""
    place = tmp_path / "place"
    for number in range(3):
        filled(tmp_path / f".place.{os.getpid()}-{number}.tmp", "left")
    with new_folder(place) as making:
        assert names(making) == []
        (making / "text").write_text("one")
    same_numbers()
    with new_folder(place) as making:
        (making / "text").write_text("two")
    assert (place / "text").read_text() == "two"
    same_numbers()
    write_bytes(place / "file", b"bytes")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["place"] and names(place) == ["file", "text"]


def test_only_temporaries_are_removed(tmp_path):
    filled(tmp_path / "kept", "kept")
    kept = (".lock", "run.json", "a.tmp", ".a.tmp.json", "kept.tmp")
    for name in kept:
        (tmp_path / name).write_text("kept")
    filled(tmp_path / ".student.7-0.tmp" / "deep", "half")
    (tmp_path / ".run.json.7-1.tmp").write_text("half")
    (tmp_path / ".link.7-2.tmp").symlink_to(tmp_path / "kept")
    (tmp_path / ".broken.7-3.tmp").symlink_to(tmp_path / "nowhere")
    remove_temporaries(tmp_path)
    assert names(tmp_path) == sorted([*kept, "kept"])
    assert (tmp_path / "kept" / "text").read_text() == "kept", "the link is removed, its target stays"


def test_temporaries_of_some_files_are_removed(tmp_path):
    for name in (".weights-v1.7-0.tmp", ".rows-v1.7-1.tmp", "weights-v1"):
        (tmp_path / name).write_text("half")
    remove_temporaries(tmp_path, of="weights-")
    assert names(tmp_path) == [".rows-v1.7-1.tmp", "weights-v1"]


def test_temporaries_of_a_living_writer_stay(tmp_path):
    """A folder lives while something in it changes."""
    filled(tmp_path / ".living.7-0.tmp" / "deep", "half")
    filled(tmp_path / ".dead.7-1.tmp" / "deep", "half")
    os.utime(tmp_path / ".living.7-0.tmp", (0, 0))
    for path in (tmp_path / ".dead.7-1.tmp", *(tmp_path / ".dead.7-1.tmp").rglob("*")):
        os.utime(path, (0, 0))
    remove_temporaries(tmp_path, unchanged_s=3600)
    assert names(tmp_path) == [".living.7-0.tmp"]


def test_no_folder_has_no_temporaries(tmp_path):
    remove_temporaries(tmp_path / "none")
    (tmp_path / "file").write_text("")
    remove_temporaries(tmp_path / "file")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("name", "temporary"),
    [(".a.json.7-0.tmp", True), (".tmp", True), ("a.tmp", False), (".a", False), (".a.tmp.b", False)],
)
def test_names_of_unfinished_writes(name, temporary):
    assert is_temporary(name) is temporary
