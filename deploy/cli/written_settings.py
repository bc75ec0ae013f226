"""Writes settings into the text of a configuration, whose comments and other lines stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from distill.config.tree import escaped


def with_settings(text: str, settings: Mapping[str, Any]) -> str:
    """Return YAML ``text`` with values (dotted name -> value) in place of its own, or in addition to them."""
    for name, value in settings.items():
        text = _with_setting(text, name.split("."), escaped(value))
    return text


def as_yaml(value: object) -> str:
    """A value as YAML has it on one line, in any place."""
    text = yaml.safe_dump([value], width=math.inf, allow_unicode=True, default_flow_style=True)
    return text.strip()[1:-1]


def _with_setting(text: str, path: list[str], value: Any) -> str:
    node: Any = yaml.compose(text, yaml.SafeLoader)
    header: Any = None
    while path and isinstance(node, yaml.MappingNode):
        members = {key.value: (key, member) for key, member in node.value}
        if path[0] not in members:
            return _inserted(text, node, header, path, value)
        header, node = members[path[0]]
        path = path[1:]
    if path:  # a preset by its name, of which a field is set
        value = {"preset": node.value, **_nested(path, value)}
    return f"{text[: node.start_mark.index]}{as_yaml(value)}{text[node.end_mark.index :]}"


def _inserted(text: str, mapping: Any, header: Any, path: list[str], value: Any) -> str:
    """The text with a member that ``mapping`` lacks. ``header``: the key of the mapping; None: the whole file."""
    if mapping.flow_style:
        place = mapping.start_mark.index + 1
        return f"{text[:place]}{path[0]}: {as_yaml(_nested(path[1:], value))}, {text[place:]}"
    if header is not None:
        place = text.index("\n", header.end_mark.index) + 1
        return f"{text[:place]}  {path[0]}: {as_yaml(_nested(path[1:], value))}\n{text[place:]}"
    return f"{text}{path[0]}:\n  {path[1]}: {as_yaml(_nested(path[2:], value))}\n"


def _nested(path: list[str], value: Any) -> Any:
    for name in reversed(path):
        value = {name: value}
    return value
