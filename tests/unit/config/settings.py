"""Ways to go through all settings and to change one of them."""

from __future__ import annotations

import dataclasses
import typing

from distill.config import RunConfig, StudentConfig, StudentInitConfig

STUDENT = "student: {init: {from: teacher, num_layers: 10}}\n"
"""The one thing that a configuration must set."""
VALID = RunConfig(student=StudentConfig(init=StudentInitConfig(source="teacher", num_layers=1)))


def leaf_paths(part: type, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    """(path of field names, type) of every setting below a dataclass."""
    hints = typing.get_type_hints(part)
    paths: list[tuple[tuple[str, ...], object]] = []
    for field in dataclasses.fields(part):
        path, hint = (*prefix, field.name), hints[field.name]
        paths += leaf_paths(hint, path) if dataclasses.is_dataclass(hint) else [(path, hint)]
    return paths


def replaced(part: object, path: tuple[str, ...], value: object):
    """A copy of a dataclass with one setting changed."""
    name, *rest = path
    return dataclasses.replace(
        part, **{name: replaced(getattr(part, name), tuple(rest), value) if rest else value}
    )
