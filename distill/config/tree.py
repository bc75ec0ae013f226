"""Conversion between trees of settings, as YAML has them, and the dataclasses.

:mod:`distill.config.load` builds a configuration here, and everything else uses :func:`to_yaml`,
:func:`fingerprint` and :func:`flat_settings`. Every mistake in a tree raises a :class:`ConfigError`;
OmegaConf's own messages, which name its internal types, never reach the user. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal

import xxhash
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from distill.config import RunConfig, StudentInitConfig
from distill.config.retired import RETIRED
from distill.config.rules import default_remedy
from distill.config.written import kinds_of, typed
from distill.errors import NO_VALUE, ConfigError, did_you_mean, first_line
from distill.redaction import contains_credentials, redacted

Tree = dict[str, Any]

WRITTEN_NAMES: Mapping[tuple[type, str], str] = {(StudentInitConfig, "source"): "from"}
"""Fields whose name in YAML and overrides is a Python keyword."""

_LONGEST_SHOWN = 200
"""Characters of a value that an error repeats."""
NOT_FINGERPRINTED = ("run_dir", "cluster", "tracking")
"""The settings that cannot change a run's numbers: where its folder is, where its actors run and who shows it."""


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML with every setting written out. Loading it gives an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(_written(config, escape=True)))


def fingerprint(config: RunConfig) -> str:
    """xxh3-64, hexadecimal, over every setting that determines the numbers of the run.

    These are all settings except those of :data:`NOT_FINGERPRINTED`.
    """
    tree = {name: value for name, value in _written(config).items() if name not in NOT_FINGERPRINTED}
    return xxhash.xxh3_64_hexdigest(json.dumps(tree, sort_keys=True).encode())


_LENGTH_AND_RECORDS = (
    "learner.num_updates",
    "evaluation.every",
    "evaluation.num_prompts_during",
    "evaluation.best_metric",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.wait_for_room_s",
    "scoring.check",
    "learner.on_nonfinite",
    "learner.max_nonfinite",
)
_ENGINE_RESOURCES = ("num_threads", "tensor_parallel_size", "kv_cache_gib", "gpu_memory_utilization")
_RESOURCES = (
    *(f"{section}.{name}" for section in ("rollout", "scoring") for name in _ENGINE_RESOURCES),
    "rollout.max_num_seqs",
    "scoring.max_num_seqs",
    *(f"replay.{name}" for name in ("memory_bytes", "max_bytes", "segment_bytes")),
    *(
        f"learner.{name}"
        for name in ("num_threads", "micro_batch_tokens", "keep_activations", "vocabulary_chunk")
    ),
    "weights.deadline_s",
)
"""Memory, processors and time: they change numbers by rounding at most. A run that has too little of one can only
continue with another value."""
MAY_CHANGE = (*_LENGTH_AND_RECORDS, *_RESOURCES)
"""The settings that may be changed when a run is resumed, in addition to those outside the fingerprint."""
MAY_CHANGE_UNLESS_LOCK_STEP = ("rollout.replicas", "scoring.replicas")
"""In lock-step, the number of actors decides which texts are computed together."""

PLACES = (
    "data.path",
    *(f"{model}.{name}" for model in ("teacher", "student", "proxy") for name in ("model", "revision")),
)
"""The settings that say where an input is. A resumed run may have others if the same content is there."""


def kept_settings(config: RunConfig) -> dict[str, Any]:
    """The settings, by name, that a resumed run must have as it had them when it began."""
    may_change = MAY_CHANGE if config.replay.lock_step else (*MAY_CHANGE, *MAY_CHANGE_UNLESS_LOCK_STEP)
    return {
        name: value
        for name, value in flat_settings(config).items()
        if name not in may_change and name.partition(".")[0] not in NOT_FINGERPRINTED
    }


def resume_fingerprint(config: RunConfig) -> str:
    """xxh3-64, hexadecimal, over :func:`kept_settings`."""
    return xxhash.xxh3_64_hexdigest(json.dumps(kept_settings(config), sort_keys=True).encode())


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting by the dotted name that it has in YAML."""
    return flatten(_written(config))


def with_settings(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A configuration with other settings, by their dotted names of two parts."""
    for name, value in changes.items():
        section, _, setting = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{setting: value})})
    return config


def setting_names() -> list[str]:
    """Dotted names of all settings, as in YAML."""
    return list(setting_types())


def setting_types() -> dict[str, Any]:
    """Dotted name, as in YAML -> type of the setting."""
    return dict(_leaves(RunConfig, ""))


def is_text(hint: Any) -> bool:
    """Whether a setting of this type contains text that the user chooses."""
    return any(kind in (str, list[str]) for kind in kinds_of(hint))


def build(tree: Tree) -> RunConfig:
    """Build the configuration of a tree of settings, without checking its rules.

    Raises: ConfigError for an unknown name or a value of the wrong type.
    """
    try:
        typed = OmegaConf.merge(_schema(), OmegaConf.create(_by_field(tree, RunConfig, "")))
        config = typing.cast(RunConfig, OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        raise _explain(error, tree) from None
    flat = flatten(_written(config))
    for name, hint in setting_types().items():
        value = flat[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(name, value, "be finite", default_remedy(_default(name)))
        if _choices(hint) and value is not None and value not in _choices(hint):
            raise _wrong_value(name, hint, value)  # the result of an interpolation
        if is_text(hint):
            _require_printable(name, value)
            _require_no_credentials(name, value)
    return config


def _require_printable(name: str, value: Any) -> None:
    """Require text that files can contain: the bytes of a name on disk need not be UTF-8.

    Raises: ConfigError.
    """
    for text in value if isinstance(value, list) else [value or ""]:
        if (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)) or "\0" in text:
            remedy = "rename the file or folder if it is a path, or write other text"
            raise ConfigError(name, ascii(text), "be UTF-8 text without a null byte", remedy)


def _require_no_credentials(name: str, value: Any) -> None:
    """Require that no setting has a credential, because a run writes its settings to its folder and its report.

    Lists are texts of prompts or names of trackers. The error does not repeat the value.

    Raises: ConfigError.
    """
    if isinstance(value, str) and contains_credentials(value):
        remedy = (
            "put them where the library looks for them: an environment variable such as HF_TOKEN, or ~/.netrc"
        )
        raise ConfigError(name, redacted(value), "contain no password or token", remedy)


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(RunConfig)


def _by_field(tree: Tree, part: type, prefix: str) -> Tree:
    """Rename the keys of the tree to the dataclasses' field names.

    Raises: ConfigError for an unknown name, and for a value where a section belongs or the reverse.
    """
    hints = _hints(part)
    renamed: Tree = {}
    for written, value in tree.items():
        name = f"{prefix}{written}"
        if written not in hints:
            raise _unknown(name, prefix, hints)
        field_name, hint = hints[written]
        value = typed(value, hint)
        if is_dataclass(hint):
            value = None if value == "" else value  # `section:` with nothing below it
            if value is not None and not isinstance(value, dict):
                raise ConfigError(
                    name, _shown(value), "be a section", f"write its settings, for example {_example(name)}"
                )
            renamed[field_name] = _by_field(value or {}, typing.cast(type, hint), f"{name}.")
        elif not _has_shape(value, hint):
            raise _wrong_value(name, hint, value)
        elif value == "???":  # OmegaConf's mark for a missing value, which it would replace with the default
            raise ConfigError(name, value, "be given", "replace ??? with a value")
        else:
            renamed[field_name] = value
    return renamed


def _has_shape(value: Any, hint: Any) -> bool:
    """Whether a value can be of a type; OmegaConf checks the rest."""
    if hint is bool and isinstance(value, str):
        return "${" in value  # OmegaConf would read 2 as true
    return not isinstance(value, dict) and (not isinstance(value, list) or _is_list(hint))


@cache
def _hints(part: type) -> dict[str, tuple[str, Any]]:
    """Name of each field in YAML -> (name of the field, type)."""
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
    """The values of a dataclass by their names in YAML. Values of float fields become floats."""
    tree: Tree = {}
    for written, (field_name, hint) in _hints(type(part)).items():
        value = getattr(part, field_name)
        if is_dataclass(hint):
            tree[written] = _written(value, escape=escape)
        elif float in (hint, *typing.get_args(hint)) and value is not None:
            tree[written] = float(value)
        elif isinstance(value, str | list) and escape:
            tree[written] = escaped(value)
        else:
            tree[written] = value
    return tree


def escaped(value: Any) -> Any:
    """Escape ``${`` in text and in the texts of a list; other values are returned unchanged.

    OmegaConf reads it as an interpolation unless a backslash precedes it. Backslashes that already precede it are
    doubled.
    """
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested mapping by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return flat


# Messages


def _unknown(name: str, prefix: str, hints: Mapping[str, object]) -> ConfigError:
    if name in RETIRED:
        return ConfigError(name, NO_VALUE, "be the name of a setting", RETIRED[name])
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
    remedy = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(siblings)}"
    shown = _one_line(name) if name.isprintable() and name.strip() else repr(name)
    return ConfigError(shown, NO_VALUE, "be the name of a setting", remedy)


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.rpartition(".")[2].split("_"))


def _explain(error: OmegaConfBaseException, tree: Tree) -> ConfigError:
    name = _written_path(error.full_key or "")
    hint = setting_types().get(name)
    if isinstance(error, ValidationError) and hint is not None:
        return _wrong_value(name, hint, flatten(tree).get(name))
    return ConfigError(
        name or "configuration", NO_VALUE, f"be loadable ({first_line(error)})", "correct the value"
    )


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


def _wrong_value(name: str, hint: Any, value: object) -> ConfigError:
    if f"{name}={value}" in RETIRED:
        remedy = RETIRED[f"{name}={value}"]
    elif choices := _choices(hint):
        remedy = did_you_mean(str(value), choices)
    else:
        remedy = default_remedy(_default(name))
    return ConfigError(name, _shown(value), f"be {_expected(hint)}", remedy)


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [_expected(kind) for kind in typing.get_args(hint) if kind is not types.NoneType]
        return " or ".join([*kinds, "null"])
    if choices := _choices(hint):
        return f"one of {', '.join(choices)}"
    if _is_list(hint):
        return "a list, such as " + ("[0, 1, 5]" if typing.get_args(hint) == (int,) else "[first, second]")
    return {
        bool: "a boolean (true or false)",
        int: "an integer",
        float: "a number",
        str: "a string",
    }[hint]


def _is_list(hint: Any) -> bool:
    return list in (typing.get_origin(hint), *map(typing.get_origin, typing.get_args(hint)))


def _choices(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _default(name: str) -> str:
    return _shown(flatten(_written(RunConfig()))[name])


def _example(section: str) -> str:
    first = next(name for name in setting_names() if name.startswith(f"{section}."))
    return f"{first}={_default(first)}"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return _one_line(str(value))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_SHOWN else f"{line[:_LONGEST_SHOWN]}…"
