"""The fingerprint of a checkpoint covers everything that changes what the model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.run import identity
from deploy.run.identity import checkpoint_fingerprint
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
