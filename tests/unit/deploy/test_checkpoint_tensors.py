"""Tensors that do not fit the config.json beside them, found from the headers of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from learner.model.head import Head
from tests.tiny import save_tiny_llama, tiny_tokenizer
from tests.unit.deploy.conftest import Doctor, fault, passes

ROLES = ["teacher", "student", "proxy"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
VLLM = ("rollout.engine=vllm", "scoring.engine=vllm")


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or remove (None) tensors; dots of names are written as two underscores."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    """Set keys of config.json, or remove them (None)."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def resave(folder: Path, out: Path) -> Path:
    """What the remedies say: load, write, and save the tokenizer there too."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


@pytest.mark.parametrize("role", ROLES)
def test_missing_tensor(doctor: Doctor, tmp_path: Path, role: str) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    assert passes(doctor(folder, role=role))
    change_tensors(folder, model__norm__weight=None, model__layers__1__mlp__up_proj__weight=None)
    error = fault(doctor(folder, role=role))
    assert error.name == f"{role}.model"
    assert "(model.layers.1.mlp.up_proj.weight and 1 more missing)" in error.must


@pytest.mark.parametrize("role", ROLES)
def test_more_layers_than_the_config_says(doctor: Doctor, tmp_path: Path, role: str) -> None:
    """transformers would ignore them, and the model would be another one."""
    folder = save_tiny_llama(tmp_path / "model")
    change_config(folder, num_hidden_layers=1)
    error = fault(doctor(folder, role=role))
    assert error.name == f"{role}.model"
    assert "not model.layers.1.input_layernorm.weight and 8 more" in error.must
    assert passes(doctor(resave(folder, tmp_path / "resaved"), role=role))


@pytest.mark.parametrize("role", ROLES)
def test_other_shape(doctor: Doctor, tmp_path: Path, role: str) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    change_config(folder, intermediate_size=96)
    error = fault(doctor(folder, role=role))
    assert error.name == f"{role}.model"
    assert "(model.layers.0.mlp.down_proj.weight is [64, 128] instead of [64, 96] and 5 more)" in error.must
    change_config(folder, intermediate_size=128)
    assert passes(doctor(folder, role=role))


@pytest.mark.parametrize("role", ROLES)
def test_tied_head_that_differs_from_the_embedding(doctor: Doctor, tmp_path: Path, role: str) -> None:
    """transformers then does not tie, while vLLM and the learner take the embedding."""
    folder = save_tiny_llama(tmp_path / "model")
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    change_tensors(folder, lm_head__weight=embedding.clone())
    assert passes(doctor(folder, role=role))
    other = embedding.clone()
    other[-1, -1] += 1
    change_tensors(folder, lm_head__weight=other)
    loaded = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight
    assert torch.equal(loaded, other) and torch.equal(Head.from_checkpoint(folder).weight, embedding)
    error = fault(doctor(folder, role=role))
    assert f"have {HEAD} equal to {EMBEDDING}" in error.must
    assert "set tie_word_embeddings to false" in error.remedy
    change_config(folder, tie_word_embeddings=False)
    assert passes(doctor(folder, role=role))
    assert torch.equal(Head.from_checkpoint(folder).weight, other)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("tied", [False, None])
def test_untied_model_without_head(doctor: Doctor, tmp_path: Path, role: str, tied: bool | None) -> None:
    """transformers would draw a head at random."""
    folder = save_tiny_llama(tmp_path / "model")
    change_config(folder, tie_word_embeddings=tied)
    error = fault(doctor(folder, role=role))
    assert f"({HEAD} missing)" in error.must
    assert "set tie_word_embeddings to true" in error.remedy
    change_config(folder, tie_word_embeddings=True)
    assert passes(doctor(folder, role=role))


@pytest.mark.parametrize("role", ROLES)
def test_body_without_head_for_vllm(doctor: Doctor, tmp_path: Path, role: str) -> None:
    """vLLM loads the class that config.json lists; transformers loads the one of the model type."""
    folder = save_tiny_llama(tmp_path / "model")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    if role == "student":
        assert passes(doctor(folder, role=role))
    error = fault(doctor(folder, *VLLM, role=role))
    assert "list LlamaForCausalLM under architectures" in error.must and "(LlamaModel)" in error.must
    assert passes(doctor(resave(folder, tmp_path / "resaved"), *VLLM, role=role))


def test_body_without_the_prefix_of_the_head(doctor: Doctor, tmp_path: Path) -> None:
    """The learner looks for the names of a causal language model."""
    folder = save_tiny_llama(tmp_path / "model")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert "known embedding" in fault(doctor(folder)).must


def test_config_that_transformers_cannot_build(doctor: Doctor, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model")
    change_config(folder, hidden_act="no-such-activation")
    assert "no-such-activation" in fault(doctor(folder)).must


def test_tensors_that_transformers_renames_and_fuses(doctor: Doctor, tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=258, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert any(".experts.1.w2." in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    assert passes(doctor(tmp_path / "model"))
    change_tensors(tmp_path / "model", model__layers__0__block_sparse_moe__experts__1__w2__weight=None)
    assert "experts.down_proj is [1, 64, 32] instead of [2, 64, 32]" in fault(doctor(tmp_path / "model")).must
