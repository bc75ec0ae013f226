"""The wire format of a push, without torch and engines."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save

from distill import weights
from distill.interfaces import WeightManifest, WeightPushError
from distill.room import NoSpace
from distill.weights import (
    HashedFile,
    StalePush,
    checksum_file,
    loading,
    remove_old_weights,
    require_newer,
    stored_versions,
    verify,
    verify_once,
    weights_path,
    write_weights,
)
from tests.media import fill, mounted


def _write(folder: Path, version: int, value: float = 1.0) -> WeightManifest:
    tensors = {"model.norm.weight": np.full(1000, value, np.float32)}
    return write_weights(
        folder, lambda file: file.write(save(tensors)), policy_version=version, update=10 * version
    )


def test_a_written_push_matches_its_manifest(tmp_path: Path) -> None:
    manifest = _write(tmp_path / "run", 7)
    content = Path(manifest.path).read_bytes()
    assert manifest == WeightManifest(
        policy_version=7,
        update=70,
        path=str(weights_path(tmp_path / "run", 7)),
        num_bytes=len(content),
        checksum=xxhash.xxh3_64_hexdigest(content),
    )
    verify(manifest)
    np.testing.assert_array_equal(load_file(manifest.path)["model.norm.weight"], np.ones(1000, np.float32))


def test_the_checksum_covers_all_bytes(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes((4 << 20) + 12345)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert checksum_file(path) == (len(content), xxhash.xxh3_64_hexdigest(content))
    path.write_bytes(b"")
    assert checksum_file(path) == (0, xxhash.xxh3_64_hexdigest(b""))


def test_the_error_for_a_flipped_byte_states_both_checksums(tmp_path: Path) -> None:
    manifest = _write(tmp_path, 1)
    path = Path(manifest.path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    got = xxhash.xxh3_64_hexdigest(bytes(content))
    with pytest.raises(
        WeightPushError,
        match=rf"^weights of policy version 1 in {path}: checksum={got} must be {manifest.checksum} \(xxh3-64\)$",
    ):
        verify(manifest)


def test_the_error_for_a_short_file_states_both_sizes(tmp_path: Path) -> None:
    manifest = _write(tmp_path, 1)
    path = Path(manifest.path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(
        WeightPushError,
        match=rf"policy version 1 in {path}: size={manifest.num_bytes - 4} bytes must be {manifest.num_bytes} bytes$",
    ):
        verify(manifest)


def test_a_missing_file_is_a_push_error(tmp_path: Path) -> None:
    manifest = dataclasses.replace(_write(tmp_path, 1), path=str(tmp_path / "absent"))
    with pytest.raises(
        WeightPushError, match=r"policy version 1 in .*absent must be in a readable file \(.*No such file"
    ):
        verify(manifest)


def test_a_version_is_never_written_twice(tmp_path: Path) -> None:
    first = _write(tmp_path, 3)
    with pytest.raises(FileExistsError, match="policy version 3 was already written"):
        _write(tmp_path, 3, value=2.0)
    verify(first)


def test_a_failing_writer_leaves_no_file(tmp_path: Path) -> None:
    def fail(file: HashedFile) -> None:
        file.write(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_weights(tmp_path, fail, policy_version=1, update=0)
    assert list(tmp_path.iterdir()) == []


def test_older_weights_are_removed(tmp_path: Path) -> None:
    for version in (1, 2, 10, 100_000_000):
        _write(tmp_path, version)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert remove_old_weights(tmp_path, before=10) == [1, 2]
    assert stored_versions(tmp_path) == [10, 100_000_000]
    assert remove_old_weights(tmp_path, before=10) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.safetensors",
        "weights-v00000010.safetensors",
        "weights-v100000000.safetensors",
    ]


def test_only_newer_versions_are_accepted() -> None:
    require_newer(4, 3)
    for pushed in (2, 3):
        with pytest.raises(
            StalePush,
            match=rf"^policy version of a push={pushed} must be above 3, the version that the engine has$",
        ):
            require_newer(pushed, 3)


# One check per node


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose bytes were read for a checksum."""
    found: list[str] = []

    def counted(path: str) -> tuple[int, str]:
        found.append(str(path))
        return checksum_file(path)

    monkeypatch.setattr(weights, "checksum_file", counted)
    return found


def test_the_bytes_are_read_once_however_many_engines_load_them(tmp_path: Path, reads: list[str]) -> None:
    first, second = _write(tmp_path, 1), _write(tmp_path, 2)
    for _ in range(3):
        verify_once(first)
        with loading(second):
            pass
    assert reads == [first.path, second.path]


@pytest.mark.parametrize("check", [verify_once, lambda manifest: loading(manifest).__enter__()])
def test_a_corrupted_file_fails_for_every_engine(
    tmp_path: Path, check: Callable[[WeightManifest], object]
) -> None:
    manifest = _write(tmp_path, 1)
    content = Path(manifest.path).read_bytes()
    Path(manifest.path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(3):
        with pytest.raises(WeightPushError, match=rf"checksum=[0-9a-f]{{16}} must be {manifest.checksum}"):
            check(manifest)


def test_a_file_that_changed_after_its_check_is_read_again(tmp_path: Path) -> None:
    manifest = _write(tmp_path, 1)
    verify_once(manifest)
    content = Path(manifest.path).read_bytes()
    Path(manifest.path).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightPushError, match="checksum="):
        verify_once(manifest)
    with pytest.raises(WeightPushError, match=r"be 0123 \(xxh3-64\)$"):
        verify_once(dataclasses.replace(_write(tmp_path, 2), checksum="0123"))


def test_a_missing_file_leaves_no_marker(tmp_path: Path) -> None:
    manifest = _write(tmp_path, 1)
    Path(manifest.path).unlink()
    with pytest.raises(WeightPushError, match=r"must be in a readable file \(.*No such file"):
        verify_once(manifest)
    with (
        pytest.raises(WeightPushError, match=r"must be in a readable file \(.*No such file"),
        loading(manifest),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


PROCESS = """
import sys, time
from distill import weights
from distill.interfaces import WeightManifest

path, num_bytes, checksum = sys.argv[1:]
manifest = WeightManifest(policy_version=1, update=0, path=path, num_bytes=int(num_bytes), checksum=checksum)
slow = weights.checksum_file

def checksum_file(path):
    print("reads", flush=True)
    time.sleep(0.5)
    return slow(path)

weights.checksum_file = checksum_file
print("ready", flush=True)
sys.stdin.readline()
with weights.loading(manifest):
    print("loads", flush=True)
    sys.stdin.readline()
"""


class Process:
    """A receiver in a process of its own; it loads until the test releases it."""

    def __init__(self, manifest: WeightManifest) -> None:
        arguments = [manifest.path, str(manifest.num_bytes), manifest.checksum]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[str, str]:
        """Return what it printed since, and its error."""
        return self.process.communicate(timeout=60)


def test_two_processes_read_the_bytes_once_and_load_together(tmp_path: Path) -> None:
    manifest = _write(tmp_path, 1)
    both = [Process(manifest) for _ in range(2)]
    for process in both:
        process.go()
    printed = [[process.line()] for process in both]
    for lines, process in zip(printed, both, strict=True):
        if lines == ["reads"]:
            lines.append(process.line())
    assert sorted(printed) == [["loads"], ["reads", "loads"]]
    for process in both:
        process.go()
        assert process.end() == ("", "")


def test_two_processes_reject_a_corrupted_file(tmp_path: Path) -> None:
    manifest = dataclasses.replace(_write(tmp_path, 1), checksum="0" * 16)
    both = [Process(manifest) for _ in range(2)]
    for process in both:
        process.go()
    for process in both:
        printed, error = process.end()
        assert printed == "reads\n"
        assert "WeightPushError" in error and "must be 0000000000000000 (xxh3-64)" in error


def test_a_file_stays_while_another_process_loads_it(tmp_path: Path) -> None:
    """A push's deadline does not stop a remote load, and the next push removes old files."""
    manifest = _write(tmp_path, 1)
    _write(tmp_path, 2)
    process = Process(manifest)
    process.go()
    assert [process.line(), process.line()] == ["reads", "loads"]
    assert remove_old_weights(tmp_path, before=2) == []
    assert stored_versions(tmp_path) == [1, 2]
    process.go()
    assert process.end() == ("", "")
    assert remove_old_weights(tmp_path, before=2) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["weights-v00000002.safetensors"]


# Room


def test_weights_for_which_shared_memory_has_no_room_are_written_to_the_disk(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    with mounted(tmp_path / "memory", 64 << 10) as memory:

        def write(version: int, num_bytes: int, spill: Path | None) -> WeightManifest:
            return write_weights(
                memory,
                lambda file: file.write(content[:num_bytes]),
                policy_version=version,
                update=0,
                spill_dir=spill,
            )

        small = write(1, 1000, tmp_path / "disk")
        large = write(2, len(content), tmp_path / "disk")
        assert [Path(each.path).parent.name for each in (small, large)] == ["memory", "disk"]
        assert Path(large.path).read_bytes() == content
        with loading(large):
            pass
        assert [path.name for path in memory.iterdir()] == [Path(small.path).name]
        with pytest.raises(NoSpace, match=r"larger /dev/shm|free some there"):
            write(3, len(content), None)
        with pytest.raises(FileExistsError):
            write(2, 10, tmp_path / "disk")


def test_weights_are_loaded_although_there_is_no_room_for_the_mark_that_they_are_verified(
    tmp_path: Path,
) -> None:
    with mounted(tmp_path / "memory", 64 << 10) as memory:
        manifest = _write(memory, 1)
        fill(memory)
        for _ in range(2):
            with loading(manifest):
                pass
        assert remove_old_weights(memory, before=2) == [1]
