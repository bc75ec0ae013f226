"""What the program reads about the machine, from files that look like those of Linux."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.machine import hardware


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
def test_auto_is_bfloat16_only_where_the_processor_computes_in_it(
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


def test_a_gpu_gets_longer_packs_unless_a_setting_decides() -> None:
    assert hardware.resolve_micro_batch_tokens(None, "cpu") == 1024
    assert hardware.resolve_micro_batch_tokens(None, "cuda") == 4096
    assert hardware.resolve_micro_batch_tokens(300, "cuda") == 300


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("", 8)]
)
def test_a_container_quota_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: set(range(8)))
    path = tmp_path / "cpu.max"
    path.write_text(quota)
    assert hardware.usable_cores(str(path)) == cores
    assert hardware.usable_cores(str(tmp_path / "absent")) == 8
