"""A student cut from the teacher: evenly spaced layers are kept, everything else is copied.

Called once per run, by :mod:`deploy.run.prepare`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.errors import NO_VALUE, ConfigError
from distill.files import new_folder

KEPT_LAYERS_KEY = "distill_kept_layers"
"""Key of the student's config.json under which the kept layers of the teacher are recorded."""


def kept_layers(num_teacher_layers: int, num_layers: int) -> list[int]:
    """``num_layers`` evenly spaced layers, including the first and the last; a single layer is the first."""
    return np.linspace(0, num_teacher_layers - 1, num_layers).round().astype(int).tolist()


def cut_student(teacher_dir: str | Path, out_dir: str | Path, num_layers: int) -> Path:
    """Write a checkpoint of ``num_layers`` of the teacher's layers, with its tokenizer.

    An ``out_dir`` that already exists is kept if it is the same cut; it is never left half-written.

    Raises: ConfigError when the teacher has fewer layers, is not built like Llama, or ``out_dir`` is
    something else.
    """
    out_dir = Path(out_dir)
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype="auto")
    keep = _choose(model, num_layers)
    if out_dir.exists():
        return _same_cut(out_dir, keep)
    _keep_layers(model, keep)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    with new_folder(out_dir, if_exists="keep") as making:
        model.save_pretrained(making)
        tokenizer.save_pretrained(making)
    return _same_cut(out_dir, keep)  # another process may have been faster


def _choose(model: Any, num_layers: int) -> list[int]:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(
        model.config, "num_hidden_layers", None
    ):
        raise ConfigError(
            "student.init.from",
            "teacher",
            f"have a teacher whose layers are in model.layers, as Llama's, not a {type(model).__name__}",
            "set student.model to a checkpoint instead",
        )
    if not 1 <= num_layers <= len(layers):
        raise ConfigError(
            "student.init.num_layers",
            num_layers,
            f"lie in [1, {len(layers)}], the teacher's layers",
            "keep fewer layers",
        )
    return kept_layers(len(layers), num_layers)


def _keep_layers(model: Any, keep: list[int]) -> None:
    layers, config = model.model.layers, model.config
    # Lists with an entry per layer (layer_types, no_rope_layers, ...) are cut like the layers.
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == len(layers):
            setattr(config, name, [value[index] for index in keep])
    model.model.layers = nn.ModuleList(layers[index] for index in keep)
    config.num_hidden_layers = len(keep)
    setattr(config, KEPT_LAYERS_KEY, keep)


def _same_cut(out_dir: Path, keep: list[int]) -> Path:
    config = out_dir / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get(KEPT_LAYERS_KEY) != keep:
        raise ConfigError(out_dir, NO_VALUE, f"be absent or the student cut to layers {keep}", "move it away")
    return out_dir
