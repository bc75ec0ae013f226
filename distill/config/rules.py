"""Rules that many settings share: bounds, with the default as the remedy."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from distill.errors import ConfigError

_COMPARED = {">=": operator.ge, ">": operator.gt}


def bounded(section: str, part: Any, bound: str, *names: str) -> Iterator[ConfigError]:
    """Fields of a section that lie outside ``bound``: ``>= 1``, ``> 0`` or an interval, ``[0, 1)``.

    Null satisfies every bound. The remedy is the field's default.
    """
    defaults = {field.name: field.default for field in fields(part)}
    for name in names:
        value = getattr(part, name)
        if value is not None and not _holds(value, bound):
            must = f"be {bound}" if bound[0] == ">" else f"lie in {bound}"
            default = "null" if defaults[name] is None else defaults[name]
            yield ConfigError(
                f"{section}.{name}" if section else name, value, must, f"{default} is the default"
            )


def _holds(value: float, bound: str) -> bool:
    if bound[0] == ">":
        sign, _, number = bound.partition(" ")
        return _COMPARED[sign](value, float(number))
    low, high = (float(number) for number in bound[1:-1].split(","))
    return (value > low if bound[0] == "(" else value >= low) and (
        value < high if bound[-1] == ")" else value <= high
    )
