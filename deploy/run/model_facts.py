"""Facts of a checkpoint that need no loading: sizes, vocabulary, context, stop ids.

They come from config.json, generation_config.json and the headers of the safetensors files.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A causal LM's checkpoint folder."""

    folder: Path
    model_type: str
    vocab_size: int
    hidden_size: int
    context_tokens: int
    num_parameters: int
    stop_token_ids: tuple[int, ...]
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path, setting: str) -> ModelFacts:
        """Read the facts of a checkpoint; ``setting`` is its name in errors.

        Raises: ConfigError when the folder is not a Hugging Face checkpoint in safetensors.
        """
        folder = Path(folder)
        config = _json(folder / "config.json", setting)
        missing = [name for name in ("model_type", "vocab_size", "hidden_size") if name not in config]
        if missing:
            raise ConfigError(
                setting, folder, f"have {', '.join(missing)} in its config.json",
                     "use a causal language model saved with save_pretrained"
            )  # fmt: skip
        return cls(
            folder=folder,
            model_type=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            context_tokens=config.get("max_position_embeddings", 1 << 30),
            num_parameters=_num_parameters(folder, setting),
            stop_token_ids=_stop_token_ids(folder, config, setting),
            config=config,
        )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what decides the ids of a text: the vocabulary, added tokens, and the split of a probe.

    Padding and truncation settings are left out, because they differ between checkpoints of one family.
    """
    probe = "Héllo, wörld! 12345\n\tif x != y: return 'ok'  <|im_start|> 東京 🙂"
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probe": tokenizer(probe, add_special_tokens=False)["input_ids"],
    }
    return xxhash.xxh3_64_hexdigest(json.dumps(facts, ensure_ascii=True).encode())


def _json(path: Path, setting: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            setting, path.parent, f"contain {path.name}", "give the folder of a Hugging Face checkpoint"
        ) from error
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(setting, path, f"be readable JSON ({error})", "save the model again") from error


def _num_parameters(folder: Path, setting: str) -> int:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            setting,
            folder,
            "contain safetensors files (pickled weights are not read)",
            "convert it with save_pretrained",
        )
    try:
        return sum(_elements(path) for path in files)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            setting, folder, f"contain whole safetensors files ({error})", "fetch or save the model again"
        ) from error


def _elements(path: Path) -> int:
    with safe_open(path, framework="numpy") as file:  # fails unless header and tensors cover the file
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _stop_token_ids(folder: Path, config: dict[str, Any], setting: str) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    eos = _json(path, setting).get("eos_token_id") if path.exists() else None
    eos = config.get("eos_token_id") if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
