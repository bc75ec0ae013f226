"""Faults in the files of a checkpoint, found before an engine starts, for every model that a run opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.model.head import Head
from tests.tiny import save_tiny_llama
from tests.unit.deploy.conftest import Doctor, fault, passes

INDEX = "model.safetensors.index.json"
ROLES = ["teacher", "student", "proxy"]


def sharded(folder: Path) -> list[Path]:
    """A checkpoint of at least three shards; returns the shards."""
    save_tiny_llama(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= 3
    return shards


@pytest.mark.parametrize("role", ROLES)
def test_missing_shard_is_named(doctor: Doctor, tmp_path: Path, role: str) -> None:
    shards = sharded(tmp_path / "model")
    assert passes(doctor(tmp_path / "model", role=role))
    shards[1].unlink()
    error = fault(doctor(tmp_path / "model", role=role))
    assert error.name == f"{role}.model" and f"({shards[1].name} missing)" in error.must


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("content", ["cut", "garbage", "empty"])
def test_broken_shard_is_named(doctor: Doctor, tmp_path: Path, role: str, content: str) -> None:
    broken = sharded(tmp_path / "model")[-1]
    whole = broken.read_bytes()
    broken.write_bytes({"cut": whole[:-4], "garbage": b"\xff" * len(whole), "empty": b""}[content])
    error = fault(doctor(tmp_path / "model", role=role))
    assert f"contain whole safetensors files ({broken.name}: " in error.must


@pytest.mark.parametrize(
    "index",
    ["{", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"lm_head.weight": 3}}', '{"weight_map": "x"}'],
)
def test_unusable_index(doctor: Doctor, tmp_path: Path, index: str) -> None:
    sharded(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(index)
    error = fault(doctor(tmp_path / "model"))
    assert str(error.value).endswith(INDEX) and "be an index of tensors" in error.must


def test_index_that_contradicts_the_files(doctor: Doctor, tmp_path: Path) -> None:
    """transformers takes what the files contain; the learner looks where the index says."""
    shards = sharded(tmp_path / "model")
    index = tmp_path / "model" / INDEX
    content = json.loads(index.read_text())
    name = "model.embed_tokens.weight"
    other = next(shard.name for shard in shards if shard.name != content["weight_map"][name])
    content["weight_map"][name] = other
    index.write_text(json.dumps(content))
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(Exception, match=name):
        Head.from_checkpoint(tmp_path / "model")
    assert f"contain {name} in {other}" in fault(doctor(tmp_path / "model")).must


def test_index_without_its_files_beside_a_whole_file(doctor: Doctor, tmp_path: Path) -> None:
    """transformers ignores such an index; vLLM and the learner fail on it."""
    folder = tmp_path / "model"
    for shard in sharded(folder):
        shard.unlink()
    save_tiny_llama(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(FileNotFoundError):
        Head.from_checkpoint(folder)
    error = fault(doctor(folder))
    assert "00001-of" in error.must and "vLLM and the learner follow the index" in error.must
    assert f"delete {folder / INDEX}" in error.remedy
    (folder / INDEX).unlink()
    assert passes(doctor(folder))


def test_shards_beside_a_whole_file(doctor: Doctor, tmp_path: Path) -> None:
    """The programs of one run would load different weights."""
    folder = tmp_path / "model"
    sharded(folder)
    whole_file = save_tiny_llama(tmp_path / "other", seed=7) / "model.safetensors"
    whole_file.rename(folder / whole_file.name)
    whole = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert not torch.equal(Head.from_checkpoint(folder).weight, whole)
    error = fault(doctor(folder))
    assert "contain either model.safetensors or the files of" in error.must
    (folder / "model.safetensors").unlink()
    assert passes(doctor(folder))


@pytest.mark.parametrize("role", ROLES)
def test_another_model_beside_a_whole_file_for_vllm(doctor: Doctor, tmp_path: Path, role: str) -> None:
    """Without an index, vLLM loads both files, and its weights are those of the last one."""
    folder = save_tiny_llama(tmp_path / "model")
    other = save_tiny_llama(tmp_path / "other", seed=7) / "model.safetensors"
    other.rename(folder / "old.safetensors")
    assert passes(doctor(folder, role=role))
    error = fault(doctor(folder, "rollout.engine=vllm", "scoring.engine=vllm", role=role))
    assert error.name == f"{role}.model" and "vLLM would load old.safetensors too" in error.must
    (folder / "old.safetensors").unlink()
    assert passes(doctor(folder, "rollout.engine=vllm", "scoring.engine=vllm", role=role))


def test_index_of_a_whole_file(doctor: Doctor, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    assert passes(doctor(folder))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("whole_model", [False, True])
def test_adapter(doctor: Doctor, tmp_path: Path, role: str, whole_model: bool) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    save_file({"lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    if not whole_model:
        (folder / "model.safetensors").unlink()
        (folder / "config.json").unlink()
    error = fault(doctor(folder, role=role))
    assert error.name == f"{role}.model" and "not an adapter" in error.must
    assert "merge_and_unload" in error.remedy


@pytest.mark.parametrize("role", ROLES)
def test_pickled_weights(doctor: Doctor, tmp_path: Path, role: str) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    error = fault(doctor(folder, role=role))
    assert "it has only pytorch_model.bin" in error.must and "save_pretrained" in error.remedy
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "converted")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "converted")
    assert passes(doctor(tmp_path / "converted", role=role))


def test_gguf_without_anything_else(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.Q4_1.gguf").write_bytes(b"GGUF")
    error = fault(doctor(tmp_path / "model"))
    assert "it has only tiny.Q4_1.gguf" in error.must and "GGUF file was made from" in error.remedy


def test_hub_id_of_which_only_a_part_was_downloaded(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without access to the hub, its client returns the folder that a broken download has left."""
    repository = tmp_path / "hub" / "models--owner--name"
    shards = sharded(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert passes(doctor("owner/name"))
    shards[0].unlink()
    error = fault(doctor("owner/name"))
    assert shards[0].name in error.must
    assert error.remedy == f"delete {repository} and run this again with access to the hub"
