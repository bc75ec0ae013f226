"""Checks of quantised checkpoints: which engine loads which format.

A model that is trained must not be quantised. The learner reads only the head of another model, which
:func:`deploy.run.preflight.weights.head` checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deploy.run.model_facts import ModelFacts
from deploy.run.preflight.outcome import Check
from distill.config import RolloutConfig, RunConfig, ScoringConfig
from distill.errors import ConfigError, first_line
from distill.machine.hardware import resolve_dtype

_Engine = RolloutConfig | ScoringConfig

_VLLM_ON_GPU = ("gptq", "awq", "fp8", "compressed-tensors")
_VLLM_ON_CPU = ("gptq", "awq", "compressed-tensors")
"""Formats that vLLM 0.32 loads. Those of the CPU build were tried with tiny models; it fails on fp8 for lack of
kernels. Those of a GPU are on vLLM's list and were not tried. Neither list has bitsandbytes."""
_CPU_BITS = 4
"""The CPU build's only width of gptq and awq."""
_ORIGINAL = "use the checkpoint that it was quantised from"


def quantisation(facts: ModelFacts) -> str | None:
    """The format of a quantised checkpoint; None for plain numbers."""
    config = facts.config.get("quantization_config")
    return None if config is None else str(config.get("quant_method", "bitsandbytes"))


def require_plain(setting: str, facts: ModelFacts) -> None:
    """Raises: ConfigError when a model that is to be trained is quantised."""
    if (method := quantisation(facts)) is not None:
        raise ConfigError(
            setting, facts.folder, f"not be quantised ({method}), because it is trained", _ORIGINAL
        )


def loaded_by(role: str, facts: ModelFacts, config: RunConfig, sections: Sequence[str]) -> Check:
    """Check that the engines of ``sections`` load a quantised model.

    Raises: ConfigError.
    """
    method = quantisation(facts)
    assert method is not None
    engines: dict[str, _Engine] = {section: getattr(config, section) for section in sections}
    for section, engine in engines.items():
        if engine.engine == "vllm":
            _require_vllm(f"{role}.model", facts, method, section)
            _require_bfloat16(role, facts, method, section, engine)
        else:
            _require_transformers(f"{role}.model", facts, method, section)
    by = " and ".join(f"{section}.engine={engine.engine}" for section, engine in engines.items())
    return Check(f"{role} quantisation", "pass", f"{method}, which {by} can load")


def _require_vllm(setting: str, facts: ModelFacts, method: str, section: str) -> None:
    from torch.cuda import is_available

    device, known = ("a GPU", _VLLM_ON_GPU) if is_available() else ("a CPU", _VLLM_ON_CPU)
    bits = facts.config["quantization_config"].get("bits", _CPU_BITS)
    if method in known and (device == "a GPU" or bits == _CPU_BITS):
        return
    found = f"{method} of {bits} bits" if method in known else method
    width = f" of {_CPU_BITS} bits" if method in known else ""
    raise ConfigError(
        setting, facts.folder, f"be plain or quantised in a format that {section}.engine=vllm loads on {device} "
        f"({', '.join(known)}{width}), not {found}",
        _ORIGINAL,
    )  # fmt: skip


def _require_bfloat16(role: str, facts: ModelFacts, method: str, section: str, engine: _Engine) -> None:
    """vLLM multiplies packed weights only in half precision."""
    from torch.cuda import is_available

    packed = facts.config["quantization_config"].get("format") == "pack-quantized"
    if method == "compressed-tensors" and not packed:
        return
    if resolve_dtype(engine.dtype, "cuda" if is_available() else "cpu") == "float32":
        raise ConfigError(
            f"{section}.dtype", engine.dtype, f"be bfloat16 for a {role} quantised with {method}, because vLLM has no kernel for "
            "it in float32",
            "set it to bfloat16",
        )  # fmt: skip


def _require_transformers(setting: str, facts: ModelFacts, method: str, section: str) -> None:
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        # transformers' types do not describe its quantisers.
        quantiser: Any = AutoHfQuantizer.from_config(facts.config["quantization_config"], pre_quantized=True)
        quantiser.validate_environment(device_map=None)
    except Exception as error:  # each of thirty formats raises its own
        raise ConfigError(
            setting, facts.folder, f"be plain or quantised in a format that {section}.engine=transformers loads here "
            f"({method}: {first_line(error)})",
            f"{_ORIGINAL}, or install what is missing",
        ) from error  # fmt: skip
