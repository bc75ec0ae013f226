"""Checkpoints: the tensors and the state that were saved, or an error; never others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.process.checkpoint import MANIFEST, CheckpointError, Checkpoints, _checksum, read_manifest
from tests.unit.bad_input.outcome import cases, outcome_of

TENSORS = {"a": torch.arange(40.0), "b": torch.ones(3, 2)}
STATE = {"updates_done": 3, "ledger": {"prefix": 2, "extra": [5, 9]}, "text": "é"}
SHARD = "rank-0.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoints(tmp_path_factory.mktemp("saved"), keep=1).save(1, TENSORS, STATE)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "step-1"))


def is_as_saved(loaded: tuple[dict[str, torch.Tensor], dict[str, Any]] | None) -> bool:
    assert loaded is not None
    tensors, state = loaded
    return (
        tensors.keys() == TENSORS.keys()
        and all(map(torch.equal, tensors.values(), TENSORS.values()))
        and state == STATE
    )


@cases(150)
@given(
    st.sampled_from([MANIFEST, SHARD]), st.integers(0, 5000), st.binary(min_size=1, max_size=6), st.booleans()
)
def test_bytes_that_changed(saved: Path, folder: Path, name: str, at: int, by: bytes, cut: bool):
    content = bytearray((saved / name).read_bytes())
    at %= len(content)
    content[at : len(content) if cut else at + len(by)] = by
    for each in (MANIFEST, SHARD):
        shutil.copy(saved / each, folder / each)
    (folder / name).write_bytes(content)
    outcome = outcome_of(lambda: Checkpoints.load(folder))
    if outcome.error is None:
        assert is_as_saved(outcome.accepted), "only white space of the manifest may differ"
    else:
        assert isinstance(outcome.error, CheckpointError) and outcome.error.remedy


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@cases(100)
@given(
    st.sampled_from(["format_version", "step", "shards", "state", "xxh3", "all", "shard", "num_bytes"]),
    JSON,
    st.booleans(),
)
def test_values_of_a_manifest(saved: Path, folder: Path, key: str, value: Any, sealed: bool):
    """``sealed``: with a checksum that is right, as another program could write it."""
    manifest: Any = json.loads((saved / MANIFEST).read_text())
    if key == "all":
        manifest = value
    elif key == "shard":
        manifest["shards"][SHARD] = value
    elif key == "num_bytes":
        manifest["shards"][SHARD]["num_bytes"] = value
    else:
        manifest[key] = value
    if sealed and isinstance(manifest, dict):
        manifest.pop("xxh3", None)
        manifest["xxh3"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    outcome = outcome_of(lambda: Checkpoints.load(folder))
    if outcome.error is not None:
        assert isinstance(outcome.error, CheckpointError) and outcome.error.remedy
    elif key not in ("shards", "state", "step"):
        assert is_as_saved(outcome.accepted)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 100_000, b'{"shards": 3, "state": {}}']
)
def test_manifests_that_are_none(folder: Path, content: bytes):
    (folder / MANIFEST).write_bytes(content)
    assert isinstance(outcome_of(lambda: read_manifest(folder)).error, CheckpointError)


@pytest.mark.parametrize("name", [MANIFEST, SHARD])
@pytest.mark.parametrize("instead", ["nothing", "a folder", "an empty file"])
def test_files_that_are_not_there(folder: Path, name: str, instead: str):
    (folder / name).unlink()
    if instead == "a folder":
        (folder / name).mkdir()
    elif instead == "an empty file":
        (folder / name).touch()
    assert isinstance(outcome_of(lambda: Checkpoints.load(folder)).error, CheckpointError)
