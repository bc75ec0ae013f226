"""AdamW over the student, and its state as named tensors (no pickle)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def adamw(
    parameters: Iterable[nn.Parameter], *, beta1: float, beta2: float, weight_decay: float
) -> torch.optim.AdamW:
    """The learning rate is set before every step by :func:`set_learning_rate`."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=(beta1, beta2), weight_decay=weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """State of every parameter, by its number in the optimiser: ``<prefix>.<n>.<name>``."""
    tensors: dict[str, Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{prefix}.{number}.{name}"] = torch.as_tensor(value)
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        start = f"{prefix}.{number}."
        state = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        if state:
            optimizer.state[parameter] = {
                name: value.clone() if name == "step" else value.to(parameter.device)
                for name, value in state.items()
            }
