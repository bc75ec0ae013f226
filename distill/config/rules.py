"""Rules that many settings share: bounds, and the remedy that names the default."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from distill.errors import ConfigError

_COMPARED = {">=": operator.ge, ">": operator.gt}


def bounded(section: str, part: Any, bound: str, *names: str, remedy: str = "") -> Iterator[ConfigError]:
    """Yield an error for every named field outside ``bound``: ``>= 1``, ``> 0`` or an interval, ``[0, 1)``.

    ``section``: the part's name in the configuration; empty for the top level. Null satisfies every
    bound. Without a ``remedy`` the error names the field's default.
    """
    defaults = {field.name: field.default for field in fields(part)}
    for name in names:
        value = getattr(part, name)
        if value is not None and not _is_within(value, bound):
            must = f"be {bound}" if bound[0] == ">" else f"lie in {bound}"
            default = "null" if defaults[name] is None else str(defaults[name])
            yield ConfigError(
                f"{section}.{name}" if section else name, value, must, remedy or default_remedy(default)
            )


def default_remedy(default: str) -> str:
    """The remedy for a value that has no better one. ``default``: the setting's default, as YAML has it."""
    return f"correct the value (the default is {default})"


def _is_within(value: float, bound: str) -> bool:
    if bound[0] == ">":
        sign, _, number = bound.partition(" ")
        return _COMPARED[sign](value, float(number))
    low, high = (float(number) for number in bound[1:-1].split(","))
    return (value > low if bound[0] == "(" else value >= low) and (
        value < high if bound[-1] == ")" else value <= high
    )
