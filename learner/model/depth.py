"""Which of the teacher's layers a cut student keeps.

Block influence is Men et al. 2024, "ShortGPT", equation 1: how far a layer turns the states that pass
through it. Layers that hardly turn them can be removed with the least damage. Evenly spaced layers are the
alternative that needs no text; they damage the model far more (docs/demo.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from distill.machine.vector_math import settle_vector_math
from learner.model.cut import layer_stack


def even_layers(num_teacher_layers: int, num_layers: int) -> list[int]:
    """``num_layers`` evenly spaced layers, including the first and the last; a single layer is the first."""
    return np.linspace(0, num_teacher_layers - 1, num_layers).round().astype(int).tolist()


def most_influential(influence: Sequence[float], num_layers: int) -> list[int]:
    """The ``num_layers`` layers with the highest influence, ascending.

    The first and the last layer are always among them, because they connect the others to the embedding
    and to the head; a single layer is the first.
    """
    last = len(influence) - 1
    ends = [0, last][:num_layers]
    inner = sorted(range(1, last), key=lambda layer: -influence[layer])
    return sorted([*ends, *inner[: num_layers - len(ends)]])


def block_influence(
    folder: str | Path, texts: Sequence[Sequence[int]], *, device: torch.device, precision: torch.dtype
) -> list[float]:
    """1 − cos(input state, output state) of every layer, averaged over all tokens of ``texts``.

    ``texts``: token ids, each text non-empty. The model is loaded for this call only.

    Raises: ConfigError when the model is not built like Llama.
    """
    settle_vector_math()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=precision, local_files_only=True)
    layers = layer_stack(model.to(device).eval())
    sums = torch.zeros(len(layers), dtype=torch.float64)

    def add(number: int, before: Tensor, after: Tensor | tuple[Tensor, ...]) -> None:
        after = after if isinstance(after, Tensor) else after[0]
        turned = 1 - cosine_similarity(before.float(), after.float(), dim=-1)
        sums[number] += turned.sum().item()

    for number, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda _, args, kwargs, output, number=number: add(
                number, args[0] if args else kwargs["hidden_states"], output
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        for tokens in texts:
            model.get_decoder()(torch.tensor([list(tokens)], device=device), use_cache=False)
    return (sums / sum(map(len, texts))).tolist()
