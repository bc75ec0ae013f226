"""The tensors of a checkpoint's folder, from the headers of the files that a run opens.

Three programs open them. transformers prefers ``model.safetensors`` to the index; vLLM and the learner, which
reads the teacher's head (:mod:`learner.model.head`), prefer the index. A folder in which they would open
different files is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distill.errors import ConfigError
from distill.files import NOT_AS_WRITTEN, is_plain_name

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, without its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Name in safetensors: F32, BF16, I32, F8_E4M3, ..."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def stored_tensors(folder: Path, setting: str, again: str) -> dict[str, StoredTensor]:
    """Read the headers of all weight files of ``folder``; returns the tensors by name.

    ``setting`` is the checkpoint's name in errors. ``again`` is the remedy for files that are missing or broken.

    Raises: ConfigError when a file is missing or broken, or when it is ambiguous which files the weights are.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / WHOLE).is_file():
            raise ConfigError(setting, folder, f"contain {WHOLE} or {INDEX}", again)
        return _header(folder / WHOLE, setting, again)
    placed = _weight_map(index, setting, again)
    names = sorted(set(placed.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and (folder / WHOLE).is_file():
        raise ConfigError(
            setting, folder, f"contain all files that its {INDEX} names ({', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing), although it has {WHOLE}: vLLM and the learner follow the index",
            f"delete {index} if {WHOLE} is the whole model",
        )  # fmt: skip
    if missing:
        must = f"contain all files that its {INDEX} names ({', '.join(missing)} missing)"
        raise ConfigError(setting, folder, must, again)
    if names != [WHOLE] and (folder / WHOLE).is_file():
        raise ConfigError(
            setting, folder, f"contain either {WHOLE} or the files of {INDEX}, because transformers loads the former "
            "and vLLM the latter",
            f"move {WHOLE}, or the index and its files, out of the folder",
        )  # fmt: skip
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        tensors |= _header(folder / name, setting, again)
    astray = [
        tensor
        for tensor, name in placed.items()
        if tensor not in tensors or tensors[tensor].file.name != name
    ]
    if astray:
        tensor = astray[0]
        must = f"contain {tensor} in {placed[tensor]}, as its {INDEX} says"
        raise ConfigError(setting, folder, must, again)
    return tensors


def _weight_map(index: Path, setting: str, again: str) -> Mapping[str, str]:
    try:
        placed = json.loads(index.read_text())["weight_map"]
        if not placed or not all(map(is_plain_name, placed.values())):
            raise ValueError("its weight_map must name files of its folder")
    except (OSError, *NOT_AS_WRITTEN) as error:
        reason = "it has no weight_map" if isinstance(error, KeyError | TypeError) else error
        raise ConfigError(setting, index, f"be an index of tensors ({reason})", again) from error
    return placed


def _header(path: Path, setting: str, again: str) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy") as file:  # fails unless header and tensors cover the file
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file=path, shape=tuple(part.get_shape()), dtype=part.get_dtype())
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        must = f"contain whole safetensors files ({path.name}: {error})"
        raise ConfigError(setting, path.parent, must, again) from error
