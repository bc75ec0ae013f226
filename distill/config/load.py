"""From a YAML file, presets and overrides to a :class:`RunConfig`, and back to YAML.

Called by the command line before anything starts and by whoever reads ``config.yaml`` of a
run folder. Every mistake of a user is a :class:`ConfigError` of one line; what the loader
underneath says about its own types never reaches them. Imports neither torch nor
transformers.

A layer is a partial tree of settings: the file, then each override in the order given.
``recipe: kd`` in a layer means the preset ``recipes/kd.yaml``, itself such a tree: its
``recipe`` section replaces the one so far, its other sections are merged, and what the
layer and later layers say applies on top. ``recipe: {preset: kd, ...}`` says the same, with
fields on top in the same layer.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import xxhash
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from distill.config import ConfigError, RunConfig, StudentInitConfig, rule

Tree = dict[str, Any]

WRITTEN_NAMES: Mapping[tuple[type, str], str] = {(StudentInitConfig, "source"): "from"}
"""Fields whose name in YAML and overrides is a Python keyword."""

NOT_FINGERPRINTED = ("run_dir", "cluster")
"""Where a run lies and where its actors run: the only settings that leave its numbers alone."""


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), presets: str | Path | None = None
) -> RunConfig:
    """The configuration of a file with dotted overrides (``learner.num_updates=40``) on top.

    ``path``: None for the overrides alone. ``presets``: the folder whose ``recipes/NAME.yaml`` a
    recipe given by name refers to.

    Raises: ConfigError for whatever is wrong with the file, an override or a value.
    """
    tree: Tree = {}
    file = {} if path is None else read_yaml(path)
    for layer in (file, *map(_parse_override, overrides)):
        tree = _apply(tree, layer, None if presets is None else Path(presets))
    config = _build(tree)
    config.validate()
    return config


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every setting written out; loading it gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(_written(config, escape=True)))


def fingerprint(config: RunConfig) -> str:
    """xxh3-64, hexadecimal, over every setting that determines the numbers of the run.

    That is all of them but ``run_dir`` and ``cluster``: a run moved to another folder or
    another cluster goes on as the same run, one with any other setting changed does not.
    """
    tree = {name: value for name, value in _written(config).items() if name not in NOT_FINGERPRINTED}
    return xxhash.xxh3_64_hexdigest(json.dumps(tree, sort_keys=True).encode())


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as it is written in YAML."""
    return _flatten(_written(config))


def setting_names() -> list[str]:
    """Dotted names of all settings, as they are written."""
    return [name for name, _ in _leaves(RunConfig, "")]


# Reading layers


def read_yaml(
    path: str | Path,
    what: str = "configuration",
    must: str = "hold a mapping of sections; write `section:` and its settings below",
) -> Tree:
    """A file's mapping. ``what`` file it is and what it ``must`` hold, for the errors.

    Raises: ConfigError with the line, for what is no YAML, keys given twice included.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} must be a {what} file; there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8"
        raise ConfigError(f"{path} must be a readable {what} file; {reason}") from None
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_problem(error)}; mend the YAML there") from None
    except OSError:  # what OmegaConf raises for a document that is a lone number
        loaded = None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}; mend the value") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must {must}")
    return typing.cast(Tree, OmegaConf.to_container(loaded, resolve=False))


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f" line {error.problem_mark.line + 1}: {_one_line(error.problem or 'not YAML')}"
    return f": {_first_line(error)}"


def _parse_override(override: str) -> Tree:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"{override!r} must be name=value; for example learner.num_updates=40")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = _yaml_problem(error) if isinstance(error, yaml.YAMLError) else f": {_first_line(error)}"
        raise ConfigError(f"{override!r}{problem}; put the value in quotes") from None
    tree = typing.cast(Tree, value)["value"]
    for part in reversed(name.strip().split(".")):
        tree = {part: tree}
    return tree


def _apply(tree: Tree, layer: Tree, presets: Path | None) -> Tree:
    recipe = layer.get("recipe")
    if isinstance(recipe, str):
        recipe = {"preset": recipe}
    if isinstance(recipe, dict) and "preset" in recipe:
        tree = _merge({**tree, "recipe": {}}, _read_preset(str(recipe["preset"]), presets))
        layer = layer | {"recipe": {name: value for name, value in recipe.items() if name != "preset"}}
    return _merge(tree, layer)


def _read_preset(name: str, presets: Path | None) -> Tree:
    if presets is None:
        raise ConfigError(
            rule("recipe", name, "be a mapping of settings: there are no presets here", "write the fields")
        )
    known = {path.stem: path for path in sorted((presets / "recipes").glob("*.yaml"))}
    if name not in known:
        raise ConfigError(rule("recipe", name, f"be one of {', '.join(known)}", _did_you_mean(name, known)))
    preset = read_yaml(known[name])
    if not isinstance(preset.get("recipe"), dict):
        raise ConfigError(f"{known[name]} must hold a section recipe; write `recipe:` and its settings below")
    return preset


def _merge(base: Tree, layer: Tree) -> Tree:
    merged = dict(base)
    for name, value in layer.items():
        old = merged.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[name] = _merge(old, value)
        elif not (isinstance(old, dict) and value is None):  # `section:` with nothing below it
            merged[name] = value
    return merged


# The tree against the dataclasses


def _build(tree: Tree) -> RunConfig:
    try:
        typed = OmegaConf.merge(_schema(), OmegaConf.create(_by_field(tree, RunConfig, "")))
        config = typing.cast(RunConfig, OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, tree)) from None
    flat = _flatten(_written(config))
    for name, hint in _leaves(RunConfig, ""):
        value = flat[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(rule(name, value, "be finite", f"the default is {_default(name)}"))
        if _choices(hint) and value is not None and value not in _choices(hint):
            raise ConfigError(_wrong_value(name, hint, value))  # came through an interpolation
    return config


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(RunConfig)


def _by_field(tree: Tree, part: type, prefix: str) -> Tree:
    """The tree under the dataclasses' field names; refuses what has no place there."""
    hints = _hints(part)
    renamed: Tree = {}
    for written, value in tree.items():
        name = f"{prefix}{written}"
        if written not in hints:
            raise ConfigError(_unknown(name, prefix, hints))
        field_name, hint = hints[written]
        if is_dataclass(hint):
            if value is not None and not isinstance(value, dict):
                raise ConfigError(
                    rule(name, _shown(value), "be a section", f"write its settings, such as {_example(name)}")
                )
            renamed[field_name] = _by_field(value or {}, typing.cast(type, hint), f"{name}.")
        elif isinstance(value, dict | list):
            raise ConfigError(_wrong_value(name, hint, value))
        elif value == "???":  # OmegaConf's mark for a value to be given; it would pass for the default
            raise ConfigError(rule(name, value, "be given", "write a value in its place"))
        else:
            renamed[field_name] = value
    return renamed


@cache
def _hints(part: type) -> dict[str, tuple[str, Any]]:
    """Written name of each field -> (field name, type)."""
    hints = typing.get_type_hints(part)
    return {
        WRITTEN_NAMES.get((part, field.name), field.name): (field.name, hints[field.name])
        for field in fields(part)
    }


def _leaves(part: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for written, (_, hint) in _hints(part).items():
        if is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{prefix}{written}.")
        else:
            yield f"{prefix}{written}", hint


def _written(part: Any, *, escape: bool = False) -> Tree:
    """The values of a dataclass under their written names, whole numbers of float fields as floats."""
    tree: Tree = {}
    for written, (field_name, hint) in _hints(type(part)).items():
        value = getattr(part, field_name)
        if is_dataclass(hint):
            tree[written] = _written(value, escape=escape)
        elif float in (hint, *typing.get_args(hint)) and value is not None:
            tree[written] = float(value)
        elif isinstance(value, str) and escape:
            tree[written] = _escaped(value)
        else:
            tree[written] = value
    return tree


def _escaped(text: str) -> str:
    """``${`` means an interpolation when read; a backslash before it, itself escaped, prevents that."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def _flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


# Messages


def _unknown(name: str, prefix: str, hints: Mapping[str, object]) -> str:
    siblings = [f"{prefix}{sibling}" for sibling in hints]
    last = name.rpartition(".")[2]
    elsewhere = [other for other in setting_names() if other.rpartition(".")[2] == last]
    initials = [sibling for sibling in siblings if _initials(sibling) == last]  # learner.lr
    near = (
        difflib.get_close_matches(name, siblings, 1, 0.8)
        or initials
        or elsewhere
        or difflib.get_close_matches(name, setting_names(), 1)
    )
    if field_of_other_name := WRITTEN_NAMES.get((StudentInitConfig, last)):
        near = [f"{prefix}{field_of_other_name}"] if field_of_other_name in hints else near
    remedy = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(siblings)}"
    return f"{name} is not a setting; {remedy}"


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.rpartition(".")[2].split("_"))


def _explain(error: OmegaConfBaseException, tree: Tree) -> str:
    name = _written_path(error.full_key or "")
    hint = dict(_leaves(RunConfig, "")).get(name)
    if isinstance(error, ValidationError) and hint is not None:
        return _wrong_value(name, hint, _flatten(tree).get(name))
    return f"{name or 'configuration'}: {_first_line(error)}; mend the value"


def _written_path(field_path: str) -> str:
    part: Any = RunConfig
    written_path: list[str] = []
    for name in field_path.split("."):
        by_field = (
            {field: (written, hint) for written, (field, hint) in _hints(part).items()}
            if is_dataclass(part)
            else {}
        )
        written, part = by_field.get(name, (name, None))
        written_path.append(written)
    return ".".join(written_path)


def _wrong_value(name: str, hint: Any, value: object) -> str:
    if choices := _choices(hint):
        remedy = _did_you_mean(str(value), choices)
    else:
        remedy = f"the default is {_default(name)}"
    return rule(name, _shown(value), f"be {_expected(hint)}", remedy)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [_expected(kind) for kind in typing.get_args(hint) if kind is not types.NoneType]
        return " or ".join([*kinds, "null"])
    if choices := _choices(hint):
        return f"one of {', '.join(choices)}"
    return {
        bool: "a boolean (true or false)",
        int: "an integer",
        float: "a number",
        str: "a text",
    }[hint]


def _choices(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _did_you_mean(value: str, names: Sequence[str] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(value, list(names), 1)
    return f"did you mean {near[0]}?" if near else "choose one of them"


def _default(name: str) -> str:
    return _shown(_flatten(_written(RunConfig()))[name])


def _example(section: str) -> str:
    first = next(name for name in setting_names() if name.startswith(f"{section}."))
    return f"{first}={_default(first)}"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _one_line(str(value))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".;")
