"""The wire format of a push, and what the machine can do: no torch, no engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

from distill.interfaces import WeightManifest, WeightPushError
from distill.machine import hardware
from distill.weights import (
    checksum_file,
    manifest_path,
    read_manifest,
    remove_old_segments,
    segment_path,
    stored_versions,
    verify,
    write_weights,
)


def _write(folder: Path, version: int, value: float = 1.0) -> WeightManifest:
    tensors = {"model.norm.weight": np.full(1000, value, np.float32)}
    return write_weights(
        folder, lambda path: save_file(tensors, path), policy_version=version, update=10 * version
    )


def test_a_written_push_is_what_its_manifest_says(tmp_path: Path) -> None:
    manifest = _write(tmp_path / "run", 7)
    content = Path(manifest.path).read_bytes()
    assert manifest == WeightManifest(
        policy_version=7,
        update=70,
        path=str(segment_path(tmp_path / "run", 7)),
        num_bytes=len(content),
        checksum=xxhash.xxh3_64_hexdigest(content),
    )
    verify(manifest)
    assert read_manifest(manifest.path) == manifest
    np.testing.assert_array_equal(load_file(manifest.path)["model.norm.weight"], np.ones(1000, np.float32))


def test_the_checksum_is_over_all_bytes_however_they_are_read(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes((4 << 20) + 12345)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert checksum_file(path) == (len(content), xxhash.xxh3_64_hexdigest(content))
    path.write_bytes(b"")
    assert checksum_file(path) == (0, xxhash.xxh3_64_hexdigest(b""))


def test_a_flipped_byte_is_named_with_both_checksums(tmp_path: Path) -> None:
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


def test_a_short_file_is_named_with_both_sizes(tmp_path: Path) -> None:
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


def test_a_writer_that_fails_leaves_no_segment(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_weights(tmp_path, fail, policy_version=1, update=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "{", '{"policy_version": 1}'])
def test_an_unreadable_manifest_is_a_push_error(tmp_path: Path, content: str | None) -> None:
    path = segment_path(tmp_path, 1)
    if content is not None:
        manifest_path(path).write_text(content)
    with pytest.raises(
        WeightPushError, match=r"^manifest=.*/weights-v00000001\.json must be a weight manifest \(.+\)$"
    ):
        read_manifest(path)


def test_old_segments_go_and_the_newest_stay(tmp_path: Path) -> None:
    for version in (1, 2, 10, 100_000_000):
        _write(tmp_path, version)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert remove_old_segments(tmp_path, keep=2) == [1, 2]
    assert stored_versions(tmp_path) == [10, 100_000_000]
    assert remove_old_segments(tmp_path, keep=2) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other.safetensors",
        "weights-v00000010.json",
        "weights-v00000010.safetensors",
        "weights-v100000000.json",
        "weights-v100000000.safetensors",
    ]


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n", False),
        ("flags : fpu avx512_bf16 amx_tile\n", True),
        ("flags : fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("model name : bf16 machine\n", False),
        (None, False),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_computes_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, native: bool
) -> None:
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert hardware.computes_in_bfloat16(str(path)) is native
    monkeypatch.setattr(hardware, "computes_in_bfloat16", lambda: native)
    assert hardware.resolve_dtype("auto") == ("bfloat16" if native else "float32")
    assert hardware.resolve_dtype("auto", "cuda") == "bfloat16"
    assert hardware.resolve_dtype("float32", "cuda") == "float32"
    assert hardware.resolve_dtype("bfloat16") == "bfloat16"


def test_a_gpu_gets_longer_packs_unless_told_otherwise() -> None:
    assert hardware.resolve_micro_batch_tokens(None, "cpu") == 1024
    assert hardware.resolve_micro_batch_tokens(None, "cuda") == 4096
    assert hardware.resolve_micro_batch_tokens(300, "cuda") == 300


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("", 8)]
)
def test_a_container_quota_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)))
    path = tmp_path / "cpu.max"
    path.write_text(quota)
    assert hardware.usable_cores(str(path)) == cores
    assert hardware.usable_cores(str(tmp_path / "absent")) == 8
