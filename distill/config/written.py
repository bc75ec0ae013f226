"""Values as the user wrote them, until the type of their setting is known.

YAML decides by its looks whether ``2025_11_26`` is a number. Here the setting decides: scalars without quotes
and the texts of overrides stay text, marked as :class:`Written`, and :func:`typed` reads them when the type is
known. A setting that is text gets exactly what was written.
"""

from __future__ import annotations

import re
import typing
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_NULL = ("", "~", "null", "Null", "NULL")


class Written(str):
    """Text without quotes."""


class WrittenLoader(yaml.SafeLoader):
    """Loads YAML with every unquoted scalar as :class:`Written`, and rejects a key that is there twice."""

    yaml_implicit_resolvers: typing.ClassVar = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set[str]()
        for key, _ in node.value:
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
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else (hint,)
    kinds = kinds or (hint,)
    of_items = next((typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list), None)
    if typing.get_origin(hint) is list:
        of_items = typing.get_args(hint)[0]
    if isinstance(value, list) and of_items is not None:
        return [typed(item, of_items) for item in value]
    if not isinstance(value, Written):
        return value
    if type(None) in kinds and value in _NULL:
        return None
    if of_items is not None:
        return typed(_as_yaml(value), hint)
    if str in kinds or any(value in typing.get_args(kind) for kind in kinds):
        return str(value)
    return _resolved(value)


def _as_yaml(text: Written) -> Any:
    try:
        loaded = yaml.load(text, WrittenLoader)
    except yaml.YAMLError:
        return str(text)
    return loaded if isinstance(loaded, list) else str(text)


def _resolved(text: Written) -> Any:
    """The number or boolean that a text is in YAML, with ``1e-3`` as a number."""
    try:
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException):
        return str(text)
    return typing.cast(dict[str, Any], tree)["value"]
