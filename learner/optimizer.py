"""AdamW over the student, its learning rate, and its state as named tensors (no pickle)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distill.errors import Diverged


def adamw(
    parameters: Iterable[nn.Parameter], *, beta1: float, beta2: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with rate 0; call :func:`set_learning_rate` before every step."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=(beta1, beta2), weight_decay=weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def require_finite(model: str, loss: float, grad_norm: float, setting: str) -> None:
    """Call it before a step. ``model``: who is trained, for the error; ``setting``: its learning rate.

    Raises: Diverged when the loss or the norm of its gradient is not finite.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Diverged(
            f"{model}'s loss and gradient norm",
            f"{loss}, {grad_norm}",
            "be finite",
            f"lower {setting}; {model} has not changed",
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """State of every parameter under ``<prefix>.<n>.<name>``, n the parameter's number in the optimizer."""
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


def learning_rate(
    update: int, num_updates: int, peak: float, warmup_fraction: float, final_fraction: float
) -> float:
    """Rate of an update, counted from 0: linear to ``peak``, then a cosine to ``final_fraction * peak``.

    The rate is above 0 in the first update and close to the final rate in the last one.
    """
    warmup = max(1, math.ceil(warmup_fraction * num_updates))
    if update < warmup:
        return peak * (update + 1) / warmup
    progress = (update - warmup + 1) / max(1, num_updates - warmup)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
