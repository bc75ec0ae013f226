"""The wire format of a push, without torch and engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

from distill.interfaces import WeightManifest, WeightPushError
from distill.weights import (
    checksum_file,
    remove_old_weights,
    stored_versions,
    verify,
    weights_path,
    write_weights,
)


def _write(folder: Path, version: int, value: float = 1.0) -> WeightManifest:
    tensors = {"model.norm.weight": np.full(1000, value, np.float32)}
    return write_weights(
        folder, lambda path: save_file(tensors, path), policy_version=version, update=10 * version
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
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_weights(tmp_path, fail, policy_version=1, update=0)
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_weights_are_kept(tmp_path: Path) -> None:
    for version in (1, 2, 10, 100_000_000):
        _write(tmp_path, version)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert remove_old_weights(tmp_path, keep=2) == [1, 2]
    assert stored_versions(tmp_path) == [10, 100_000_000]
    assert remove_old_weights(tmp_path, keep=2) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.safetensors",
        "weights-v00000010.safetensors",
        "weights-v100000000.safetensors",
    ]
