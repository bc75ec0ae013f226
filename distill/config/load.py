"""Loads a :class:`RunConfig` from a YAML file, presets and overrides.

The command line calls this before anything starts; so does all code that reads the ``config.yaml`` of a run
folder. Every mistake of the user raises a :class:`ConfigError` with a message of one line. Imports neither
torch nor transformers.

A layer is a partial tree of settings. The file is the first layer, and each override, in the given order, is
another. ``recipe: kd`` in a layer names the preset ``recipes/kd.yaml``, which is also a partial tree. The
preset's ``recipe`` section replaces the earlier one, its other sections are merged into the earlier ones, and
the settings of the layer itself and of later layers are applied on top. ``recipe: {preset: kd, ...}`` does
the same and sets further fields of the recipe in the same layer.
"""

from __future__ import annotations

import io
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config import RunConfig
from distill.config.tree import Tree, build, escaped, is_text, setting_types
from distill.config.written import NULL, Written, WrittenLoader, kinds_of, typed
from distill.errors import NO_VALUE, ConfigError, did_you_mean, first_line


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), presets: str | Path | None = None
) -> RunConfig:
    """Load a file, apply dotted overrides (``learner.num_updates=40``) and check every rule.

    ``path``: None to use only the overrides. ``presets``: the folder in which a recipe given by name is
    looked up, as ``recipes/NAME.yaml``.

    Raises: ConfigError for any mistake in the file, an override or a value.
    """
    config = read_config(path, overrides, presets)
    config.validate()
    return config


def read_config(
    path: str | Path | None, overrides: Sequence[str] = (), presets: str | Path | None = None
) -> RunConfig:
    """Load as :func:`load_config`, without checking the rules, which settings that are still missing may break.

    Raises: ConfigError for a mistake in the file or an override.
    """
    tree: Tree = {}
    try:
        file = {} if path is None else _read_settings(path)
        for layer in (file, *map(_parse_override, overrides)):
            tree = _apply(tree, layer, None if presets is None else Path(presets))
        return build(tree)
    except RecursionError:  # thousands of brackets, or an alias of a section inside itself
        place = "configuration" if path is None else path
        raise ConfigError(place, NO_VALUE, "be nested as deep as its sections", "correct it") from None


def override(name: str, value: object) -> str:
    """A setting as an override, which :func:`load_config` reads back as the same value.

    Raises: ConfigError when ``value``, read from YAML without the setting's type, is a number where the setting
    is text, or a text that an override cannot express.
    """
    kinds = kinds_of(setting_types().get(name))
    can_be_null = type(None) in kinds
    if str in kinds and not isinstance(value, str) and not (value is None and can_be_null):
        raise ConfigError(name, json.dumps(value, default=str), "be text", "put it in quotes")
    if str in kinds and can_be_null and isinstance(value, str) and value in NULL:
        raise ConfigError(name, repr(value), "not be a text that means null", "leave it out, or write null")
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


# Reading layers


def read_yaml(
    path: str | Path,
    what: str = "configuration",
    must: str = "contain a mapping of sections",
    remedy: str = "write `section:` with its settings below it",
) -> Tree:
    """Read a YAML file that contains a mapping.

    ``what`` (the kind of file), ``must`` (what it has to contain) and ``remedy`` are used in errors.

    Raises: ConfigError, with the line if the text is not YAML or has a key twice.
    """
    path = Path(path)
    text = _text_of(path, what)
    try:
        loaded = OmegaConf.load(io.StringIO(text))
    except yaml.YAMLError as error:
        raise _not_yaml(path, error, "correct the YAML there") from None
    except OSError:  # OmegaConf raises it for a document that consists of a single number
        loaded = None
    except OmegaConfBaseException as error:
        raise ConfigError(path, NO_VALUE, f"be loadable ({first_line(error)})", "correct the value") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(path, NO_VALUE, must, remedy)
    return typing.cast(Tree, OmegaConf.to_container(loaded, resolve=False))


def _read_settings(path: str | Path) -> Tree:
    """Read a YAML file of settings, whose scalars stay as they are written.

    Raises: ConfigError as :func:`read_yaml`.
    """
    path = Path(path)
    try:
        loaded = yaml.load(_text_of(path, "configuration"), WrittenLoader)
    except yaml.YAMLError as error:
        raise _not_yaml(path, error, "correct the YAML there") from None
    if loaded is None or loaded == "":
        return {}
    if not isinstance(loaded, dict):
        remedy = "write `section:` with its settings below it"
        raise ConfigError(path, NO_VALUE, "contain a mapping of sections", remedy)
    return typing.cast(Tree, loaded)


def _text_of(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(path, NO_VALUE, f"be a {what} file that exists", "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"byte {error.start} is not UTF-8"
        raise ConfigError(path, NO_VALUE, f"be a readable {what} file ({reason})") from None


def _not_yaml(what: object, error: Exception, remedy: str) -> ConfigError:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = " ".join((error.problem or "not YAML").split())
        return ConfigError(
            f"{what} line {error.problem_mark.line + 1}", NO_VALUE, f"be YAML ({problem})", remedy
        )
    return ConfigError(str(what), NO_VALUE, f"be YAML ({first_line(error)})", remedy)


def _parse_override(text: str) -> Tree:
    """A layer with one setting, whose text is exactly what was written; the value of a section is read as YAML."""
    name, equals, written = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"{text!r}", NO_VALUE, "be name=value", "for example learner.num_updates=40")
    tree: Any = Written(written)
    hint = setting_types().get(name)
    if hint is not None and is_text(hint):
        tree = escaped(typed(tree, hint))
    elif hint is None:
        try:
            tree = yaml.load(written, WrittenLoader)
        except yaml.YAMLError as error:
            raise _not_yaml(repr(text), error, "correct the value") from None
    for part in reversed(name.split(".")):
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
            "recipe",
            name,
            "be a mapping of settings, because no presets are available here",
            "write the fields",
        )
    known = {path.stem: path for path in sorted((presets / "recipes").glob("*.yaml"))}
    if name not in known:
        raise ConfigError("recipe", name, f"be one of {', '.join(known)}", did_you_mean(name, known))
    preset = _read_settings(known[name])
    if not isinstance(preset.get("recipe"), dict):
        raise ConfigError(
            known[name], NO_VALUE, "contain a section recipe", "write `recipe:` with its settings below it"
        )
    return preset


def _merge(base: Tree, layer: Tree) -> Tree:
    merged = dict(base)
    for name, value in layer.items():
        old = merged.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[name] = _merge(old, value)
        elif not (
            isinstance(old, dict) and value in (None, "")
        ):  # `section:` with nothing below it changes nothing
            merged[name] = value
    return merged
