"""Facts of a checkpoint that need no loading: sizes, vocabulary, context, stop ids.

They come from config.json, generation_config.json and the headers of the safetensors files (:mod:`deploy.run.tensor_files`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from deploy.run.tensor_files import StoredTensor, stored_tensors
from distill.errors import ConfigError

SAVE_AGAIN = "fetch or save the model again"
"""How to get a checkpoint in a folder of the user's whose files are missing or broken."""


_GPT2_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
"""Names in GPT-2's config.json -> the names that later models have."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A causal LM's checkpoint folder."""

    folder: Path
    model_type: str
    vocab_size: int
    hidden_size: int
    context_tokens: int
    stop_token_ids: tuple[int, ...]
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    """The tensors of its files by name."""

    @property
    def num_parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    @classmethod
    def read(cls, folder: str | Path, setting: str, again: str) -> ModelFacts:
        """Read the facts of a checkpoint; ``setting`` is its name in errors.

        ``again`` is the remedy for files that are missing or broken.

        Raises: ConfigError when the folder is not a whole Hugging Face checkpoint in safetensors.
        """
        folder = Path(folder)
        config = _json(folder / "config.json", setting, again)
        config |= {name: config[old] for old, name in _GPT2_NAMES.items() if old in config}
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
            stop_token_ids=_stop_token_ids(folder, config, setting, again),
            config=config,
            tensors=stored_tensors(folder, setting, again),
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


def _json(path: Path, setting: str, again: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(setting, path.parent, f"contain {path.name}", again) from error
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(setting, path, f"be readable JSON ({error})", again) from error


def _stop_token_ids(folder: Path, config: dict[str, Any], setting: str, again: str) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    eos = _json(path, setting, again).get("eos_token_id") if path.exists() else None
    eos = config.get("eos_token_id") if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
