"""Quantised checkpoints: a teacher may be one if its engines load it and its head is plain; a student may not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny_llama
from tests.unit.deploy.conftest import Doctor, fault, passes

VLLM = ("rollout.engine=vllm", "scoring.engine=vllm", "rollout.dtype=bfloat16", "scoring.dtype=bfloat16")
GROUP = 32
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def write(folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation}))
    return folder


def gptq(folder: Path, *, bits: int = 4, quantised_head: bool = False) -> Path:
    """Random 4-bit weights in the form of GPTQ. vLLM's CPU engine loads the folder."""
    save_tiny_llama(folder, tied=False)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight") and not (quantised_head and name.startswith("lm_head")):
            tensors[name] = weight.half()
            continue
        layer, (out, size) = name.removesuffix(".weight"), weight.shape
        tensors[f"{layer}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (size // 8, out), dtype=torch.int32)
        tensors[f"{layer}.qzeros"] = torch.full((size // GROUP, out // 8), 0x77777777, dtype=torch.int32)
        tensors[f"{layer}.scales"] = torch.full((size // GROUP, out), 0.02, dtype=torch.float16)
        tensors[f"{layer}.g_idx"] = torch.arange(size, dtype=torch.int32) // GROUP
    method = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": True}
    return write(folder, tensors, method | {"lm_head": quantised_head})


def compressed(folder: Path, **changes: Any) -> Path:
    """Weights of eight bits in the form of compressed-tensors."""
    save_tiny_llama(folder, tied=False)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    method = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return write(folder, tensors, method | changes)


def other(folder: Path, method: str) -> Path:
    save_tiny_llama(folder, tied=False)
    return write(folder, load_file(folder / "model.safetensors"), {"quant_method": method})


STUDENT = ("student.init.from=null", "student.init.num_layers=null")


@pytest.fixture
def plain_student(tmp_path: Path) -> tuple[str, ...]:
    return (*STUDENT, f"student.model={save_tiny_llama(tmp_path / 'student')}")


def test_gptq_teacher_in_vllm(doctor: Doctor, tmp_path: Path, plain_student: tuple[str, ...]) -> None:
    preflight = doctor(gptq(tmp_path / "model"), *VLLM, *plain_student)
    assert passes(preflight)
    text = next(check.text for check in preflight.checks if check.name == "teacher quantisation")
    assert text == "gptq, which rollout.engine=vllm and scoring.engine=vllm can load"


def test_vllm_needs_bfloat16_for_packed_weights(
    doctor: Doctor, tmp_path: Path, plain_student: tuple[str, ...]
) -> None:
    folder = gptq(tmp_path / "model")
    error = fault(doctor(folder, *VLLM, "scoring.dtype=float32", *plain_student))
    assert error.name == "scoring.dtype" and "gptq" in error.must and error.remedy == "set it to bfloat16"


@ON_CPU
@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "quark"])
def test_formats_that_vllm_lacks(
    doctor: Doctor, tmp_path: Path, method: str, plain_student: tuple[str, ...]
) -> None:
    error = fault(doctor(other(tmp_path / "model", method), *VLLM, *plain_student))
    assert error.name == "teacher.model" and f"not {method}" in error.must
    assert "rollout.engine=vllm loads on a CPU (gptq, awq, compressed-tensors)" in error.must


@ON_CPU
def test_widths_that_vllm_lacks(doctor: Doctor, tmp_path: Path, plain_student: tuple[str, ...]) -> None:
    assert "not gptq of 8 bits" in fault(doctor(gptq(tmp_path / "model", bits=8), *VLLM, *plain_student)).must


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="optimum is installed")
def test_gptq_teacher_in_transformers(doctor: Doctor, tmp_path: Path, plain_student: tuple[str, ...]) -> None:
    folder = gptq(tmp_path / "model")
    with pytest.raises(ImportError, match="optimum"):
        AutoModelForCausalLM.from_pretrained(folder)
    error = fault(doctor(folder, *plain_student))
    assert "rollout.engine=transformers loads here (gptq: Loading a GPTQ" in error.must
    assert "optimum" in error.must and "use the checkpoint that it was quantised from" in error.remedy


def test_compressed_teacher_in_transformers(
    doctor: Doctor, tmp_path: Path, plain_student: tuple[str, ...]
) -> None:
    folder = compressed(tmp_path / "model")
    _, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert passes(doctor(folder, *plain_student))


@pytest.mark.parametrize("role", ["student", "proxy"])
def test_trained_model(doctor: Doctor, tmp_path: Path, role: str) -> None:
    error = fault(doctor(compressed(tmp_path / "model"), role=role))
    assert error.name == f"{role}.model" and "not be quantised (compressed-tensors)" in error.must


def test_proxy_that_is_not_trained(doctor: Doctor, tmp_path: Path) -> None:
    assert passes(doctor(compressed(tmp_path / "model"), "proxy.num_updates=0", role="proxy"))


def test_student_cut_from_a_quantised_teacher(doctor: Doctor, tmp_path: Path) -> None:
    error = fault(doctor(compressed(tmp_path / "model")))
    assert error.name == "student.init.from" and "because it is trained" in error.must


def test_quantised_head(doctor: Doctor, tmp_path: Path, plain_student: tuple[str, ...]) -> None:
    """The learner reads the head as plain numbers."""
    error = fault(doctor(gptq(tmp_path / "packed", quantised_head=True), *VLLM, *plain_student))
    assert error.name.startswith("teacher.model") and "lm_head" in error.must
    folder = compressed(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = fault(doctor(folder, *plain_student))
    assert (error.name, error.value) == ("teacher.model: lm_head.weight", "F8_E4M3")
