"""The unembedding of a model: how logits follow from its last hidden state, and how it is loaded.

Legend: N positions, D features, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from distill.errors import ConfigError
from distill.files import is_plain_name

_PLAIN = (
    "ernie4_5", "exaone4", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "helium", "llama", "ministral",
    "mistral", "mixtral", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
_Rule = tuple[Literal["softcap", "multiply", "divide"], str, float | None]
_KNOWN: dict[str, _Rule | None] = {
    **dict.fromkeys(_PLAIN),
    "cohere": ("multiply", "logit_scale", 0.0625),
    "cohere2": ("multiply", "logit_scale", 0.0625),
    "gemma2": ("softcap", "final_logit_softcapping", 30.0),
    "gemma3_text": ("softcap", "final_logit_softcapping", None),
    "granite": ("divide", "logits_scaling", 1.0),
    "granitemoe": ("divide", "logits_scaling", 1.0),
}
"""What each architecture does after its head: kind, key of its config, the key's default.
Taken from the modelling code of transformers; other architectures are refused, never guessed."""


def known_architectures() -> list[str]:
    """The model types whose logits are known to be a transform of head(state)."""
    return sorted(_KNOWN)


_HEAD_NAMES = ("lm_head", "embed_out")
_EMBEDDING_NAMES = (
    "model.embed_tokens.weight", "model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight",
    "gpt_neox.embed_in.weight",
)  # fmt: skip


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between ``hidden @ weight.T`` and its logits."""

    scale: float = 1.0
    """Factor of the biased product (Cohere; Granite's divisor inverted)."""
    softcap: float | None = None
    """c of c · tanh(logits / c) (Gemma 2)."""
    bias: Tensor | None = None
    """[V]: the head's bias."""

    def __call__(self, product: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Logits in float32 from the product of states and head."""
        logits = product.float() if product.dtype in (torch.bfloat16, torch.float16) else product
        if self.bias is not None:
            logits = logits + self.bias
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def prefix(self, num_tokens: int) -> LogitTransform:
        """The transform of the first ``num_tokens`` tokens."""
        return self if self.bias is None else replace(self, bias=self.bias[:num_tokens])

    def detach(self) -> LogitTransform:
        """The transform as a constant."""
        return self if self.bias is None else replace(self, bias=self.bias.detach())

    @classmethod
    def from_config(cls, config: Any, bias: Tensor | None = None) -> LogitTransform:
        """``config``: a Hugging Face config, or its ``config.json`` as a mapping.

        Raises: ConfigError when the architecture is not one whose logits are known.
        """
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        model_type = values.get("model_type")
        if model_type not in _KNOWN:
            raise ConfigError(
                "model_type", model_type, f"be one of {', '.join(known_architectures())}, whose logits are known to be head(state)",
                "choose another model, or read its modelling code and add it to learner/model/head.py",
            )  # fmt: skip
        known = _KNOWN[model_type]
        if known is None:
            return cls(bias=bias)
        kind, key, default = known
        value = values.get(key, default)
        if kind == "softcap":
            return cls(softcap=None if value is None else float(value), bias=bias)
        if not value:
            raise ConfigError(f"{model_type}.{key}", value, "be a number other than 0", "repair config.json")
        return cls(scale=float(value) if kind == "multiply" else 1.0 / float(value), bias=bias)


@dataclass(frozen=True)
class Head:
    """An unembedding that is not trained: the teacher's, or a detached view of the student's."""

    weight: Float[Tensor, "V D"]
    transform: LogitTransform

    @property
    def num_tokens(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @cached_property
    def row_norms(self) -> Float[Tensor, " V"]:
        """Norm of each row; keeping the norms saves a normalised copy of the head."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.linalg.vector_norm(self.weight, dim=1, dtype=wide).clamp_min(1e-12)

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Float32 logits of some states, formed all at once."""
        return self.transform(hidden.to(self.weight.dtype) @ self.weight.T)

    def prefix(self, num_tokens: int) -> Head:
        """The head of the first ``num_tokens`` tokens.

        Models of one tokenizer may pad their vocabularies to different sizes; both policies
        are then distributions over the common prefix, and the tails have no probability.
        """
        if num_tokens == self.num_tokens:
            return self
        return Head(self.weight[:num_tokens], self.transform.prefix(num_tokens))

    @classmethod
    def from_checkpoint(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Head:
        """Read only the head from a Hugging Face checkpoint in safetensors, as float32.

        Raises: ConfigError when the architecture is unknown or the tensor is not there.
        """
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        transform = LogitTransform.from_config(config)
        files = _tensor_files(folder)
        head = next((name for name in _HEAD_NAMES if f"{name}.weight" in files), None)
        tied = config.get("tie_word_embeddings", head is None)
        weight_name = None if head is None else f"{head}.weight"
        if tied:
            embedding = next((name for name in _EMBEDDING_NAMES if name in files), None)
            weight_name = embedding or weight_name
        if weight_name is None:
            raise ConfigError("checkpoint", folder, f"contain {' or '.join(_HEAD_NAMES)}, or a known embedding",
                           "save it again with save_pretrained")  # fmt: skip
        weight = _read_tensor(files, weight_name).to(device, torch.float32)
        bias_name = next((f"{name}.bias" for name in _HEAD_NAMES if f"{name}.bias" in files), None)
        bias = None if bias_name is None else _read_tensor(files, bias_name).to(device, torch.float32)
        return cls(weight, replace(transform, bias=bias))


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        placed = json.loads(index.read_text())["weight_map"]
        if not all(map(is_plain_name, placed.values())):
            raise ConfigError(
                "checkpoint", index, "name files of its own folder", "save it again with save_pretrained"
            )
        return {name: folder / file for name, file in placed.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise ConfigError("checkpoint", folder, "contain model.safetensors or its index",
                               "convert it with save_pretrained; pickled weights are not read")  # fmt: skip
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _read_tensor(files: Mapping[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as tensors:
        return tensors.get_tensor(name)
