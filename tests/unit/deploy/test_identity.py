"""The fingerprint of a checkpoint covers everything that changes what the model computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deploy.run import identity
from deploy.run.identity import checkpoint_fingerprint, file_fingerprint
from tests.tiny import save_tiny_llama


@pytest.fixture(params=["whole", "sampled"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "sampled":
        monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
        monkeypatch.setattr(identity, "PIECE_BYTES", 64)
    return save_tiny_llama(tmp_path / "model")


def test_a_copy_has_the_same_identity(folder: Path, tmp_path: Path) -> None:
    assert checkpoint_fingerprint(folder) == checkpoint_fingerprint(save_tiny_llama(tmp_path / "copy"))


def test_every_tensor_counts(folder: Path) -> None:
    before = checkpoint_fingerprint(folder)
    weights = folder / "model.safetensors"
    original = load_file(weights)
    for name in original:
        save_file(original | {name: original[name] * 1.5}, weights)
        assert checkpoint_fingerprint(folder) != before, name
    save_file(original | {"lm_head.weight": torch.ones(2, 2)}, weights)
    assert checkpoint_fingerprint(folder) != before


@pytest.mark.parametrize(
    ("name", "value", "counts"),
    [
        ("rope_parameters", {"rope_theta": 5.0, "rope_type": "default"}, True),
        ("rms_norm_eps", 0.5, True),
        ("tie_word_embeddings", False, True),
        ("transformers_version", "4.0.0", False),
    ],
)
def test_settings_of_the_model_count(folder: Path, name: str, value: object, counts: bool) -> None:
    before = checkpoint_fingerprint(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    assert (checkpoint_fingerprint(folder) != before) == counts


# A single byte

PIECE = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@contextmanager
def flipped(path: Path, place: int, mask: int) -> Iterator[None]:
    """The file with one other byte, for a while."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        try:
            file.seek(place)
            file.write(bytes([byte ^ mask]))
            file.flush()
            yield
        finally:
            file.seek(place)
            file.write(bytes([byte]))


def sampled_places(path: Path) -> list[int]:
    """Every byte after the header that the docstring promises to sample: start, middle and end of each tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found: set[int] = set()
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            middle = max(start, (start + end - PIECE) // 2)
            for first in (start, middle, max(start, end - PIECE)):
                found |= {8 + size + byte for byte in range(first, min(first + PIECE, end))}
    return sorted(found)


@given(data=st.data(), mask=st.integers(1, 255), whole=st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_byte_that_is_hashed_counts(model: Path, data: st.DataObject, mask: int, whole: bool) -> None:
    weights = model / "model.safetensors"
    places = st.integers(0, weights.stat().st_size - 1) if whole else st.sampled_from(sampled_places(weights))
    place = data.draw(places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "WHOLE_BYTES", 1 << 30 if whole else 0)
        patch.setattr(identity, "PIECE_BYTES", PIECE)
        before = checkpoint_fingerprint(model)
        with flipped(weights, place, mask):
            assert checkpoint_fingerprint(model) != before
        assert checkpoint_fingerprint(model) == before


def test_what_a_large_checkpoint_cannot_notice(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstring says so; a change of it is a change of what a user can rely on."""
    monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
    monkeypatch.setattr(identity, "PIECE_BYTES", PIECE)
    weights = model / "model.safetensors"
    sampled = sampled_places(weights)
    between = next(first + 1 for first, then in pairwise(sampled) if then > first + 1)
    before = checkpoint_fingerprint(model)
    with flipped(weights, between, 1):
        assert checkpoint_fingerprint(model) == before


@given(content=st.binary(min_size=1, max_size=4096), data=st.data(), mask=st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_every_byte_of_a_data_file_counts(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject, mask: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.bin"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "PIECE_BYTES", 4)  # read in pieces of 256 bytes
        before = file_fingerprint(path)
        with flipped(path, data.draw(st.integers(0, len(content) - 1)), mask):
            assert file_fingerprint(path) != before
        path.write_bytes(content + b"\0")
        assert file_fingerprint(path) != before
