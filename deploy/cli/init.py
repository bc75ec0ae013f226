"""`distill init`: writes a commented configuration for one's own models and data, and says what to run next."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deploy import PRESETS
from deploy.cli.written_settings import as_yaml, with_settings
from deploy.fetch import DATA, MODELS, cache_dir, data_file, is_hub_id, model_folder, resolve_model
from deploy.paths import path_or_name
from deploy.program import program
from deploy.recipes import find_recipe
from deploy.run.model_facts import SAVE_AGAIN, ModelFacts
from distill.config import DataConfig, EvaluationConfig, RunConfig
from distill.config.load import load_config, read_config
from distill.config.tree import flat_settings
from distill.data import Example, load_rows
from distill.errors import NO_VALUE, ConfigError, did_you_mean
from distill.files import replacing_file

_FALLBACK_NUM_LAYERS = 16
"""Layers of a student that is cut from a teacher which is not on this machine yet."""
_OPTIONS = {
    "teacher.model": "--teacher",
    "student.model": "--student",
    "data.path": "--data",
    "recipe": "--recipe",
}
"""Settings that an option chooses, because the rest of the file depends on them."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the user chose."""

    teacher: str
    student: str | None
    """None: the student is cut from the teacher."""
    num_layers: int | None
    """Layers of a student that is cut from the teacher. None: two thirds of the teacher's."""
    data: str
    recipe: str
    settings: Sequence[str] = ()
    """Further settings of the file, each as key=value."""


def write_config(path: Path, choices: Choices) -> None:
    """Write the file.

    Raises: ConfigError when the file exists, and when a choice or a setting cannot be right.
    """
    if os.path.lexists(path):
        raise ConfigError(path, NO_VALUE, "not exist yet", "give the name of a new file")
    text = _render(path, choices)
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        chosen = _chosen(load_config(temporary, choices.settings, PRESETS), choices.settings)
        temporary.write_text(with_settings(text, chosen), encoding="utf-8")
        load_config(temporary, (), PRESETS)


def _chosen(config: RunConfig, settings: Sequence[str]) -> dict[str, Any]:
    """The values in ``config`` of the settings that the user gave, by name.

    Raises: ConfigError for a section.
    """
    values, names = flat_settings(config), _names(settings)
    if section := next((name for name in names if name not in values), None):
        must = "be a setting, not a section, to be written into the file"
        raise ConfigError(section, NO_VALUE, must, "give the settings of the section one by one")
    return {name: values[name] for name in names}


def _names(settings: Sequence[str]) -> list[str]:
    return [text.partition("=")[0].strip() for text in settings]


def next_commands(path: Path, choices: Choices) -> Iterator[str]:
    """The commands that lead from the file to a run, quoted for a shell."""
    distill, cache = program(), cache_dir()
    for model in dict.fromkeys((choices.teacher, choices.student)):
        if model is not None and model in MODELS and not model_folder(model, cache).is_dir():
            yield shlex.join([distill, "models", "fetch", model])
    if choices.data in DATA and not data_file(choices.data, cache).is_file():
        yield shlex.join([distill, "data", "fetch", choices.data])
    yield shlex.join([distill, "doctor", str(path)])
    yield shlex.join([distill, "train", str(path)])


def _render(path: Path, choices: Choices) -> str:
    data = _data_settings(choices)
    recipe = find_recipe(choices.recipe)
    teacher = _model("--teacher", choices.teacher)
    teacher_layers = teacher.config.get("num_hidden_layers") if teacher is not None else None
    if choices.student is not None:
        _model("--student", choices.student)
    rows = _rows(data)
    num_heldout = data.num_heldout
    if rows and "data.num_heldout" not in _names(choices.settings):
        # A quarter of a small data set; two prompts are the fewest that have a standard error.
        num_heldout = min(num_heldout, max(2, len(rows) // 4))
    environment = Environment(
        loader=FileSystemLoader(PRESETS),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = as_yaml
    return environment.get_template("init.yaml.j2").render(
        recipe=recipe,
        run_dir=f"runs/{path.stem}",
        teacher=choices.teacher,
        student=choices.student,
        teacher_layers=teacher_layers,
        num_layers=_num_layers(teacher_layers, choices.num_layers),
        data=choices.data,
        chat_template=teacher is None or _has_chat_template(teacher.folder),
        num_heldout=num_heldout,
        num_prompts_during=min(EvaluationConfig.num_prompts_during, num_heldout),
        has_references=not rows or any(row.reference for row in rows),
    )


def _model(option: str, name: str) -> ModelFacts | None:
    """The facts of a model on this machine, or None for one that has to be downloaded first."""
    if name in MODELS and not model_folder(name, cache_dir()).is_dir():
        return None
    place = resolve_model(path_or_name(name, MODELS, option), None, cache_dir(), setting=option)
    return ModelFacts.read(place, option, SAVE_AGAIN) if Path(place).is_dir() else None


def _num_layers(has: int | None, wanted: int | None) -> int:
    if has is None:
        return wanted or _FALLBACK_NUM_LAYERS
    if wanted is not None and wanted > has:
        raise ConfigError("--student-layers", wanted, f"be <= the teacher's {has}", "lower it")
    return wanted or max(1, round(has * 2 / 3))


def _has_chat_template(folder: Path) -> bool:
    tokenizer = folder / "tokenizer_config.json"
    named = tokenizer.is_file() and "chat_template" in yaml.safe_load(tokenizer.read_text(encoding="utf-8"))
    return named or (folder / "chat_template.jinja").is_file()


def _data_settings(choices: Choices) -> DataConfig:
    """The settings with which the data is read.

    Raises: ConfigError for a setting that is wrong or has an option.
    """
    for name, text in zip(_names(choices.settings), choices.settings, strict=True):
        if option := _OPTIONS.get(name):
            value = text.partition("=")[2]
            must = f"be chosen with {option}"
            raise ConfigError(name, value, must, f"write {shlex.join([option, value])} instead")
    return replace(read_config(None, choices.settings, PRESETS).data, path=choices.data)


def _rows(settings: DataConfig) -> Sequence[Example]:
    """The rows of a data set on this machine; none for data that has to be downloaded first.

    Raises: ConfigError when the data is missing or broken, or its path cannot be anything else.
    """
    data = settings.path
    if data in DATA and not data_file(data, cache_dir()).is_file():
        return []
    place = path_or_name(data, DATA, "--data")
    if data in DATA or os.path.exists(place) or glob.has_magic(place):
        return load_rows(replace(settings, path=place), cache_dir()).examples
    if not is_hub_id(data) or Path(data).suffix:
        must = (
            f"be a file or folder that exists, one of {', '.join(DATA)}, or the id of a data set (owner/name)"
        )
        raise ConfigError("--data", data, must, did_you_mean(data, DATA, "check the path"))
    return []
