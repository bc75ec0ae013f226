"""Values as the user wrote them, until the type of their setting is known.

YAML decides by its looks whether ``2025_11_26`` is a number. Here the setting decides: scalars without quotes
and the texts of overrides stay text, marked as :class:`Written`, and :func:`typed` reads them when the type is
known. A setting that is text gets exactly what was written.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from typing import Any

import yaml

NULL = ("", "~", "null", "Null", "NULL")
"""Unquoted texts that are null, for a setting that can be null."""


class Written(str):
    """Text without quotes."""


class WrittenLoader(yaml.SafeLoader):
    """Loads YAML with every unquoted scalar as :class:`Written`, and rejects a key that is there twice."""

    yaml_implicit_resolvers: typing.ClassVar = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "found a key that is not the name of a setting"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in keys and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    "while constructing a mapping",
                    node.start_mark,
                    f"found duplicate key {key.value}",
                    key.start_mark,
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def _scalar(loader: WrittenLoader, node: yaml.ScalarNode) -> str:
    return Written(node.value) if node.style is None else node.value


WrittenLoader.add_constructor("tag:yaml.org,2002:str", _scalar)


def typed(value: Any, hint: Any) -> Any:
    """Read what was written for a setting of the type ``hint``; other values are returned unchanged.

    Text that does not suit the type is returned as text, for the caller to reject.
    """
    kinds = kinds_of(hint)
    of_items = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list), None)
    if isinstance(value, list) and of_items is not None:
        return [typed(item, of_items) for item in value]
    if not isinstance(value, Written):
        return value
    if type(None) in kinds and value in NULL:
        return None
    if of_items is not None:
        return typed(_as_yaml(value), hint)
    read = next((_READERS[kind] for kind in kinds if kind in _READERS), str)
    try:
        return read(value.strip() if read is not str else value)
    except (KeyError, ValueError):
        return str(value)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a setting's value can have: ``int | None`` has two."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def _as_yaml(text: Written) -> Any:
    try:
        loaded = yaml.load(text, WrittenLoader)
    except yaml.YAMLError:
        return str(text)
    return loaded if isinstance(loaded, list) else str(text)


def _integer(text: str) -> int:
    """Read a decimal, 0x, 0o or 0b number. ``010`` is ten, which YAML reads as eight."""
    has_base = text.lower().lstrip("+-").startswith(("0x", "0o", "0b"))
    return int(text, 0 if has_base else 10)


def _boolean(text: str) -> bool:
    return _BOOLEANS[text.lower()]


_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_READERS: dict[Any, Callable[[str], Any]] = {int: _integer, float: float, bool: _boolean}
