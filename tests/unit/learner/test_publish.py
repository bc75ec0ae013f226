"""A push through shared memory: versions rise, old bytes go, a slow engine ends it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.interfaces import WeightManifest, WeightPushError
from distill.machine import hardware
from distill.weights import loading, stored_versions, verify
from learner.process import publish, weight_file
from learner.process.publish import SharedMemoryPublisher, push_dtype


class Receiver:
    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.manifests: list[WeightManifest] = []

    async def update_weights(self, manifest: WeightManifest) -> None:
        await asyncio.sleep(self.delay_s)
        verify(manifest)
        self.manifests.append(manifest)


def publisher(
    folder: Path, receiver: Receiver, deadline_s: float = 5.0, **rest: Any
) -> SharedMemoryPublisher:
    settings = {"weights": lambda: [("a", torch.ones(3))], "next_version": itertools.count(1).__next__}
    return SharedMemoryPublisher(
        receivers=[receiver], folder=folder, deadline_s=deadline_s, **(settings | rest)
    )


async def test_only_the_newest_weights_stay_in_shared_memory(tmp_path: Path) -> None:
    receiver = Receiver()
    pushes = publisher(tmp_path, receiver)
    assert [await pushes.publish(update) for update in range(4)] == [1, 2, 3, 4]
    assert stored_versions(tmp_path) == [4]
    assert [manifest.update for manifest in receiver.manifests] == [0, 1, 2, 3]


async def test_a_push_has_a_deadline(tmp_path: Path) -> None:
    with pytest.raises(
        WeightPushError,
        match=r"^push of policy version 1 must reach all 1 engines within weights\.deadline_s=0\.05; raise the deadline",
    ):
        await publisher(tmp_path, Receiver(delay_s=5), deadline_s=0.05).publish(0)


async def test_a_file_that_a_receiver_still_loads_outlives_the_next_pushes(tmp_path: Path) -> None:
    pushes = publisher(tmp_path, Receiver())
    manifest = await pushes.write(0)
    with loading(manifest):
        assert [await pushes.publish(update) for update in (1, 2)] == [2, 3]
        assert stored_versions(tmp_path) == [1, 3]
        verify(manifest)
    await pushes.publish(3)
    assert stored_versions(tmp_path) == [4]


async def test_the_parameters_may_change_once_the_file_is_written(tmp_path: Path) -> None:
    live = torch.arange(5.0)
    receiver = Receiver()
    pushes = publisher(tmp_path, receiver, weights=lambda: [("a", live)])
    manifest = await pushes.write(0)
    live.fill_(9)
    await pushes.send(manifest)
    assert load_file(receiver.manifests[0].path)["a"].tolist() == [0, 1, 2, 3, 4]
    assert pushes.push_s > 0


async def test_later_files_wait_for_their_turn(tmp_path: Path) -> None:
    """A learner that is ahead of the engines: no file goes before it is sent, and versions arrive in order."""

    class Hurried(Receiver):
        async def update_weights(self, manifest: WeightManifest) -> None:
            self.delay_s = 0.1 / manifest.policy_version  # a later version would overtake an earlier one
            await super().update_weights(manifest)

    receiver = Hurried()
    pushes = publisher(tmp_path, receiver)
    manifests = [await pushes.write(update) for update in range(3)]
    await asyncio.gather(*map(pushes.send, manifests))
    assert receiver.manifests == manifests
    assert stored_versions(tmp_path) == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_tensors_may_be_gathered_one_by_one_into_one_buffer(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is written is a copy: an alias of the buffer would give each tensor the values of the last one."""
    buffer = torch.empty(3, 2, dtype=dtype)

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            yield f"layer.{number}", buffer.fill_(number)
        buffer.fill_(float("nan"))

    receiver = Receiver()
    await publisher(tmp_path, receiver, weights=gather, dtype=dtype).publish(0)
    found = load_file(receiver.manifests[0].path)
    assert {name: tensor.unique().tolist() for name, tensor in found.items()} == {
        f"layer.{number}": [number] for number in range(4)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_a_file_has_every_weight_in_the_format_of_the_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Sizes around a piece, empty tensors, tensors that are not contiguous, and the order of the weights."""
    monkeypatch.setattr(weight_file, "_PIECE_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (7, 5), "a": (1,), "scalar": (), "empty": (0, 3), "c": (4, 16), "d": (3, 5, 11)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights["transposed"] = torch.randn(6, 9, generator=generator).T
    receiver = Receiver()
    pushes = publisher(tmp_path, receiver, weights=lambda: weights.items(), dtype=dtype)
    await pushes.publish(0)
    found = load_file(receiver.manifests[0].path)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name
    content = Path(receiver.manifests[0].path).read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0
    places = [content.index(f'"{name}":'.encode()) for name in weights]
    assert places == sorted(places)


async def test_a_source_that_changes_between_its_passes_is_an_error(tmp_path: Path) -> None:
    sizes = iter((3, 4))
    pushes = publisher(tmp_path, Receiver(), weights=lambda: [("a", torch.ones(next(sizes)))])
    with pytest.raises(ValueError, match=r"^weight a \(4,\): the header has a \(3,\)$"):
        await pushes.publish(0)
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
