"""What a broken rule of the configuration looks like."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

_COMPARED = {">=": operator.ge, ">": operator.gt}


class ConfigError(ValueError):
    """A request that cannot be run: says name, rule, value and remedy in one line."""


def rule(name: str, value: object, must: str, remedy: str) -> str:
    """The one form of every configuration error."""
    return f"{name}={value} must {must}; {remedy}"


def bounded(section: str, part: Any, bound: str, *names: str) -> Iterator[str]:
    """Fields of a section that lie outside ``bound``: ``>= 1``, ``> 0`` or an interval, ``[0, 1)``.

    Null is nowhere and passes; the remedy is the default.
    """
    defaults = {field.name: field.default for field in fields(part)}
    for name in names:
        value = getattr(part, name)
        if value is not None and not _holds(value, bound):
            must = f"be {bound}" if bound[0] == ">" else f"lie in {bound}"
            default = "null" if defaults[name] is None else defaults[name]
            yield rule(f"{section}.{name}" if section else name, value, must, f"{default} is the default")


def _holds(value: float, bound: str) -> bool:
    if bound[0] == ">":
        sign, _, number = bound.partition(" ")
        return _COMPARED[sign](value, float(number))
    low, high = (float(number) for number in bound[1:-1].split(","))
    return (value > low if bound[0] == "(" else value >= low) and (
        value < high if bound[-1] == ")" else value <= high
    )
