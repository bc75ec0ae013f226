"""A student cut from the teacher: some of its layers are kept, and everything else is copied.

:mod:`learner.model.depth` chooses the layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distill.errors import NO_VALUE, ConfigError
from distill.files import new_folder

KEPT_LAYERS_KEY = "distill_kept_layers"
"""Key of the student's config.json under which the kept layers of the teacher are recorded."""


def cut_student(teacher_dir: str | Path, out_dir: str | Path, keep: Sequence[int]) -> Path:
    """Write a checkpoint that consists of the teacher's layers ``keep``, with its tokenizer.

    ``keep``: numbers of layers, ascending from 0. An ``out_dir`` that already exists is kept if it is the
    same cut; it is never left half-written.

    Raises: ConfigError when the teacher lacks a layer, is not built like Llama, or ``out_dir`` is
    something else.
    """
    out_dir = Path(out_dir)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype="auto")
    layers = layer_stack(model)
    if not keep or not 0 <= keep[0] <= keep[-1] < len(layers):
        raise ConfigError(
            "student.init.layers",
            _listed(keep),
            f"be in [0, {len(layers) - 1}], the teacher's layers",
            "keep other layers",
        )
    if out_dir.exists():
        return _same_cut(out_dir, keep)
    _keep_layers(model, layers, keep)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    with new_folder(out_dir, if_exists="keep") as making:
        model.save_pretrained(making)
        tokenizer.save_pretrained(making)
    return _same_cut(out_dir, keep)  # another process may have been faster


def layer_count(teacher_dir: str | Path) -> int:
    """Number of the teacher's layers, found without loading its weights.

    Raises: ConfigError as :func:`layer_stack`.
    """
    config = AutoConfig.from_pretrained(teacher_dir, local_files_only=True)
    with torch.device("meta"):
        return len(layer_stack(AutoModelForCausalLM.from_config(config)))


def layer_stack(model: Any) -> nn.ModuleList:
    """The layers of a causal LM, first to last.

    Raises: ConfigError when they are not where Llama has them.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) == model.config.num_hidden_layers:
        return layers
    raise ConfigError(
        "student.init.from",
        "teacher",
        f"have a teacher whose layers are in model.layers, as Llama's, not a {type(model).__name__}",
        "set student.model to a checkpoint instead",
    )


def _keep_layers(model: Any, layers: nn.ModuleList, keep: Sequence[int]) -> None:
    config = model.config
    # Lists with an entry per layer (layer_types, no_rope_layers, ...) are cut like the layers.
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == len(layers):
            setattr(config, name, [value[index] for index in keep])
    model.model.layers = nn.ModuleList(layers[index] for index in keep)
    config.num_hidden_layers = len(keep)
    setattr(config, KEPT_LAYERS_KEY, list(keep))


def _same_cut(out_dir: Path, keep: Sequence[int]) -> Path:
    config = out_dir / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get(KEPT_LAYERS_KEY) != list(keep):
        must = f"be absent or the student cut to layers {_listed(keep)}"
        raise ConfigError(out_dir, NO_VALUE, must, "move it away")
    return out_dir


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
