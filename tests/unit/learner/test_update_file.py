"""The file of an update that was not finite, and `distill replay-batch`, which makes the update again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.cli.main import main
from distill.errors import ConfigError, Diverged
from learner.distiller import Distiller
from learner.process import update_file
from learner.process.update_file import UpdateFile
from tests.unit.learner.test_nonfinite import (
    a_distiller,
    rows_of,
    same,
    skips_of,
    spoil_token_3,
    world,
)

__all__ = ["world"]  # the fixture


@pytest.fixture(scope="module")
def file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(Diverged):
        skips_of(a_distiller(world), folder).update(rows_of(0, spoil_token_3), 5)
    return next((folder / "nonfinite").iterdir())


def test_the_file_has_all_that_the_update_began_with(world, file):
    read = UpdateFile.read(file)
    there, here = read.distiller("cpu"), a_distiller(world)
    assert there.config == here.config
    assert same(there.tensors(), here.tensors())
    assert torch.equal(there.teacher.weight, here.teacher.weight)
    batch = here.batch(rows_of(0, spoil_token_3))
    for ours, its in zip(batch.packs, read.batch.packs, strict=True):
        assert ours.sequence_lengths == its.sequence_lengths
        assert torch.equal(ours.input_ids, its.input_ids) and torch.equal(ours.counted, its.counted)
    assert read.batch.num_student_tokens == batch.num_student_tokens == 24


def test_the_command_says_what_it_found_and_ends_with_1(file, capsys, monkeypatch):
    monkeypatch.setattr("learner.process.replay_update.UpdateFile.distiller", on_cpu(UpdateFile.distiller))
    assert main(["replay-batch", str(file)]) == 1
    head, found = capsys.readouterr().out.splitlines()
    assert head.startswith(
        "update 1 of run 0a1b2c3d, weights of version 5, stage scores, 6 rows from student_text-0-0/0 to teacher_text-0-1/0: "
    )
    assert found.startswith("the first tensor that is not finite is teacher_hidden, shape ")


def test_a_finite_update_ends_with_0(file, tmp_path, capsys, monkeypatch):
    """As on another machine, or after a failure of memory that a file does not show."""
    monkeypatch.setattr("learner.process.replay_update.UpdateFile.distiller", on_cpu(UpdateFile.distiller))
    tensors = {
        name: value.nan_to_num() if value.is_floating_point() else value
        for name, value in load_file(file).items()
    }
    save(tensors, tmp_path / "sound.safetensors", facts_of(file))
    assert main(["replay-batch", str(tmp_path / "sound.safetensors")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("everything is finite when this machine")


def on_cpu(distiller: Callable[..., Distiller]) -> Callable[..., Distiller]:
    return lambda read, device: distiller(read, "cpu")


def metadata(file: Path) -> dict[str, str]:
    with update_file.safe_open(file, framework="pt") as opened:
        return opened.metadata()


def facts_of(file: Path) -> dict[str, Any]:
    return json.loads(metadata(file)[update_file._KEY])


def with_facts(**changes: Any) -> Callable[[Path, Path], object]:
    """Rewrites a file with other facts. None removes one."""

    def change(file: Path, path: Path) -> None:
        facts = {name: value for name, value in (facts_of(file) | changes).items() if value is not None}
        save(load_file(file), path, facts)

    return change


def save(tensors: dict[str, torch.Tensor], path: Path, facts: dict[str, Any]) -> None:
    """Write a file whose checksum is that of its tensors."""
    facts = facts | {"xxh3": update_file._checksum(tensors)}
    save_file(tensors, path, metadata={update_file._KEY: json.dumps(facts)})


def with_a_bit_changed(file: Path, path: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def with_tensors(
    change: Callable[[str, torch.Tensor], torch.Tensor | None],
) -> Callable[[Path, Path], object]:
    """Rewrites a file with other tensors."""

    def rewrite(file: Path, path: Path) -> None:
        tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save(kept, path, facts_of(file))

    return rewrite


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "torn": (lambda file, path: path.write_bytes(file.read_bytes()[:-100]), r"be a whole safetensors file \(.+\); take another"),
    "torn in its header": (lambda file, path: path.write_bytes(file.read_bytes()[:40]), r"be a whole safetensors file \("),
    "one bit": (with_a_bit_changed, r"have the checksum that it was written with; take another file"),
    "empty": (lambda file, path: path.write_bytes(b""), r"be a whole safetensors file \("),
    "other file": (lambda file, path: path.write_text("hello, this is text"), r"be a whole safetensors file \("),
    "other tensors": (lambda file, path: save_file({"a": torch.ones(1)}, path), r"be the batch of an update that a run wrote"),
    "facts that are no JSON": (lambda file, path: save_file({}, path, metadata={update_file._KEY: "{"}), r"be as a run wrote it"),
    "facts that are no object": (lambda file, path: save_file({}, path, metadata={update_file._KEY: "[]"}), r"be as a run wrote it"),
    "nothing about it": (with_facts(about=None), r"be as a run wrote it \(.+\); take another"),
    "counts missing": (with_facts(counts={}), r"be as a run wrote it"),
    "too many packs": (with_facts(num_packs=99), r"be as a run wrote it"),
    "no such type": (with_facts(precision="float7"), r"be as a run wrote it|must be"),
    "no groups": (with_tensors(lambda name, tensor: None if name == "group" else tensor), r"be as a run wrote it"),
    "other shapes": (with_tensors(lambda name, tensor: tensor.flatten()[:3].clone() if name.startswith("student.") else tensor), r"be as a run wrote it"),
    "other version": (with_facts(format_version=99), r"format_version of \S+=99 must be 1; replay it with the version"),
    "no file": (lambda file, path: None, r"be readable \(.+\); name a file of the folder nonfinite"),
    "folder": (lambda file, path: path.mkdir(), r"be readable \(.+\); name a file"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_read_is_one_line(file, tmp_path, capsys, damage):
    change, message = DAMAGES[damage]
    path = tmp_path / "x.safetensors"
    change(file, path)
    assert main(["replay-batch", str(path)]) == ConfigError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
