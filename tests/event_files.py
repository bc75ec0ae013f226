"""Reads TensorBoard's event files with TensorBoard's own reader. Modules that import this are skipped without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

event_accumulator: Any = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator",
    reason="TensorBoard is not installed: pip install tensorboard",
)


def read_events(folder: Path) -> Any:
    """What TensorBoard has of the event files in a folder, nothing left out."""
    reader = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    return reader


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Name -> update -> number. Raises: AssertionError when a name has an update twice."""
    reader = read_events(folder)
    found: dict[str, dict[int, float]] = {}
    for name in reader.Tags()["scalars"]:
        values = [(event.step, event.value) for event in reader.Scalars(name)]
        found[name] = dict(values)
        assert len(found[name]) == len(values), f"{name} has an update twice"
    return found


def texts(folder: Path, name: str) -> list[tuple[int, str]]:
    """(update, text) of the texts of one name."""
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in read_events(folder).Tensors(f"{name}/text_summary")
    ]


def rounded(numbers: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """The numbers as TensorBoard keeps them, in 32 bits."""
    return {
        name: {update: float(np.float32(value)) for update, value in values.items()}
        for name, values in numbers.items()
    }
