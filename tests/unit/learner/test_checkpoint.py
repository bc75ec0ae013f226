"""Checkpoints: complete or not there, and the one before a damaged one is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.room import NoSpace
from learner.process.checkpoint import MANIFEST, CheckpointError, Checkpoints, CheckpointWriter, OtherFormat
from tests.media import fill, mounted

SHARD = "rank-0.safetensors"


def make(folder: Path, *steps: int, keep: int = 5) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, {"a": torch.full((64,), float(step))}, {"updates_done": step})
    return checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **changes: object) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in (manifest | changes).items() if value is not None})
    )


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut shard": lambda folder: cut(folder / SHARD),
    "altered shard": lambda folder: flip(folder / SHARD),
    "empty shard": lambda folder: (folder / SHARD).write_bytes(b""),
    "no shard": lambda folder: (folder / SHARD).unlink(),
    "cut manifest": lambda folder: cut(folder / MANIFEST),
    "binary manifest": lambda folder: (folder / MANIFEST).write_bytes(b"\xff\x00\xfe"),
    "manifest of another kind": lambda folder: (folder / MANIFEST).write_text("[]"),
    "manifest without shards": lambda folder: rewrite(folder / MANIFEST, shards=None),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "altered state": lambda folder: rewrite(folder / MANIFEST, state={"updates_done": 99}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path: Path, damage: str) -> None:
    checkpoints = make(tmp_path, 2, 4, 6)
    for step in (4, 6):
        DAMAGES[damage](checkpoints.path(step))
    loaded = checkpoints.load_newest()
    assert loaded is not None
    assert (loaded.state, loaded.tensors["a"][0].item()) == ({"updates_done": 2}, 2.0)
    assert ["step-6" in text or "step-4" in text for text in loaded.damaged] == [True, True]
    assert "step-6" in loaded.damaged[0]
    # They are neither used nor counted again, and their places are free.
    assert checkpoints.steps() == [2]
    assert sorted(path.name for path in tmp_path.glob("damaged*")) == ["damaged-0-step-4", "damaged-0-step-6"]
    make(tmp_path, 4)
    again = checkpoints.load_newest()
    assert again is not None and (again.state, again.damaged) == ({"updates_done": 4}, ())
    DAMAGES[damage](checkpoints.path(4))
    assert checkpoints.load_newest() is not None
    assert (tmp_path / "damaged-1-step-4").is_dir()


def test_without_any_whole_one_the_newest_is_named_and_nothing_moves(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, 2, 4)
    for step in (2, 4):
        flip(checkpoints.path(step) / SHARD)
    with pytest.raises(
        CheckpointError, match=r"^contents of .*step-4/rank-0\.safetensors=.* must be .*; bring .*step-4 back"
    ):
        checkpoints.load_newest()
    assert checkpoints.steps() == [2, 4]


def test_one_of_another_version_is_not_passed_over(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, 2, 4)
    rewrite(checkpoints.path(4) / MANIFEST, format_version=99)
    with pytest.raises(OtherFormat, match=r"resume with the version that wrote it"):
        checkpoints.load_newest()
    assert checkpoints.steps() == [2, 4]


def test_a_new_run_has_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, keep=1).load_newest() is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert make(tmp_path, 1, 2, 3, keep=2).steps() == [2, 3]


# Room


def test_a_checkpoint_that_does_not_fit_leaves_those_of_before(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", 1 << 20) as disk:
        checkpoints = make(disk, 1, 2, keep=1)
        large = {"a": torch.zeros(1 << 19)}
        with pytest.raises(
            NoSpace, match=r"^free space for .*/step-3=10\d+ bytes must be >= 2\.0 MiB; free some there"
        ):
            checkpoints.save(3, large, {"updates_done": 3})
        assert [path.name for path in disk.iterdir()] == ["step-2"]
        newest = checkpoints.load_newest()
        assert newest is not None and newest.state == {"updates_done": 2}


async def test_a_checkpoint_that_waits_for_room_is_that_of_its_update(tmp_path: Path) -> None:
    """Although the learner has gone on."""
    weight = torch.zeros(1000)
    copied: list[int] = []

    async def copy(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        copied.append(step)
        return {"a": weight.clone()}, {"num_nonfinite": len(copied)}

    with mounted(tmp_path / "small", 1 << 20) as disk:
        writer = CheckpointWriter(Checkpoints(disk, keep=2), copy)
        filling = fill(disk)
        for _ in range(2):
            with pytest.raises(NoSpace):
                await writer.save(1, {"updates_done": 1})
            weight += 1
        filling.unlink()
        assert await writer.save(1, {"updates_done": 1}) == 0
        await writer.save(2, {"updates_done": 2})
        assert copied == [1, 2]
        assert [Checkpoints.load(disk / f"step-{step}")[0]["a"][0].item() for step in (1, 2)] == [0, 2]
