"""The file of a push: a copy of the weights in the engines' number format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.machine import hardware
from distill.weights import verify
from learner.process import publish, weight_file
from learner.process.publish import WeightFile, push_dtype


def test_the_parameters_may_change_once_the_file_is_written(tmp_path: Path) -> None:
    live = torch.arange(5.0)
    manifest = WeightFile(lambda: [("a", live)], tmp_path, torch.float32).write(7, 3)
    live.fill_(9)
    verify(manifest)
    assert (manifest.policy_version, manifest.update) == (7, 3)
    assert load_file(manifest.path)["a"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_may_be_gathered_one_by_one_into_one_buffer(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is written is a copy: an alias of the buffer would give each tensor the values of the last one."""
    buffer = torch.empty(3, 2, dtype=dtype)

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            yield f"layer.{number}", buffer.fill_(number)
        buffer.fill_(float("nan"))

    found = load_file(WeightFile(gather, tmp_path, dtype).write(1, 0).path)
    assert {name: tensor.unique().tolist() for name, tensor in found.items()} == {
        f"layer.{number}": [number] for number in range(4)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_has_every_weight_in_the_format_of_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Sizes around a piece, empty tensors, tensors that are not contiguous, and the order of the weights."""
    monkeypatch.setattr(weight_file, "_PIECE_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (7, 5), "a": (1,), "scalar": (), "empty": (0, 3), "c": (4, 16), "d": (3, 5, 11)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["transposed"] = torch.randn(6, 9, generator=generator).T
    path = Path(WeightFile(lambda: weights.items(), tmp_path, dtype).write(1, 0).path)
    found = load_file(path)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name
    content = path.read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0
    places = [content.index(f'"{name}":'.encode()) for name in weights]
    assert places == sorted(places)


def test_a_source_that_changes_between_its_passes_is_an_error(tmp_path: Path) -> None:
    sizes = iter((3, 4))
    weights = WeightFile(lambda: [("a", torch.ones(next(sizes)))], tmp_path, torch.float32)
    with pytest.raises(ValueError, match=r"^weight a \(4,\): the header has a \(3,\)$"):
        weights.write(1, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "engine", "bfloat16_processor", "gpu", "expected"),
    [
        ("float32", "vllm", True, True, torch.float32),
        ("bfloat16", "vllm", False, False, torch.bfloat16),
        ("auto", "vllm", True, False, torch.bfloat16),
        ("auto", "vllm", False, False, torch.float32),
        ("auto", "vllm", False, True, torch.bfloat16),
        ("auto", "transformers", False, True, torch.float32),
    ],
)
def test_a_push_has_the_number_format_of_the_engine(
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    engine: str,
    bfloat16_processor: bool,
    gpu: bool,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(hardware, "computes_in_bfloat16", lambda: bfloat16_processor)
    monkeypatch.setattr(publish.torch.cuda, "is_available", lambda: gpu)
    config: Any = SimpleNamespace(rollout=SimpleNamespace(engine=engine, dtype=dtype))
    assert push_dtype(config) is expected
