"""`distill init`: writes a commented configuration for one's own models and data, and says what to run next."""

from __future__ import annotations

import glob
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deploy import PRESETS
from deploy.fetch import DATA, MODELS, cache_dir, data_file, is_hub_id, model_folder, resolve_model
from deploy.paths import path_or_name
from deploy.recipes import find_recipe
from deploy.run.model_facts import SAVE_AGAIN, ModelFacts
from distill.config import DataConfig, EvaluationConfig
from distill.config.load import load_config
from distill.data import Example, load_rows
from distill.errors import NO_VALUE, ConfigError, did_you_mean
from distill.files import replacing_file

_FALLBACK_NUM_LAYERS = 16
"""Layers of a student that is cut from a teacher which is not on this machine yet."""


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


def write_config(path: Path, choices: Choices) -> None:
    """Write the file.

    Raises: ConfigError when the file exists, and when a choice cannot be right.
    """
    if os.path.lexists(path):
        raise ConfigError(path, NO_VALUE, "not exist yet", "give the name of a new file")
    text = _render(path, choices)
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        load_config(temporary, (), PRESETS)


def next_commands(path: Path, choices: Choices) -> Iterator[str]:
    """The commands that lead from the file to a run, quoted for a shell."""
    program, cache = _program(), cache_dir()
    for model in dict.fromkeys((choices.teacher, choices.student)):
        if model is not None and model in MODELS and not model_folder(model, cache).is_dir():
            yield shlex.join([program, "models", "fetch", model])
    if choices.data in DATA and not data_file(choices.data, cache).is_file():
        yield shlex.join([program, "data", "fetch", choices.data])
    yield shlex.join([program, "doctor", str(path)])
    yield shlex.join([program, "train", str(path)])


def _render(path: Path, choices: Choices) -> str:
    recipe = find_recipe(choices.recipe)
    teacher = _model("--teacher", choices.teacher)
    teacher_layers = teacher.config.get("num_hidden_layers") if teacher is not None else None
    if choices.student is not None:
        _model("--student", choices.student)
    rows = _rows(choices.data)
    # A quarter of a small data set; two prompts are the fewest that have a standard error.
    num_heldout = min(DataConfig.num_heldout, max(2, len(rows) // 4)) if rows else DataConfig.num_heldout
    environment = Environment(
        loader=FileSystemLoader(PRESETS),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["yaml"] = _yaml
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


def _rows(data: str) -> Sequence[Example]:
    """The rows of a data set on this machine; none for data that has to be downloaded first.

    Raises: ConfigError when the data is missing or broken, or ``data`` cannot be anything else.
    """
    if data in DATA and not data_file(data, cache_dir()).is_file():
        return []
    place = path_or_name(data, DATA, "--data")
    if data in DATA or os.path.exists(place) or glob.has_magic(place):
        return load_rows(DataConfig(path=place), cache_dir()).examples
    if not is_hub_id(data) or Path(data).suffix:
        must = (
            f"be a file or folder that exists, one of {', '.join(DATA)}, or the id of a data set (owner/name)"
        )
        raise ConfigError("--data", data, must, did_you_mean(data, DATA, "check the path"))
    return []


def _yaml(value: object) -> str:
    """A value as YAML has it on one line."""
    text = yaml.safe_dump(value, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _program() -> str:
    """How to start the command line of this environment from here."""
    script = Path(sys.executable).with_name("distill")
    found = shutil.which("distill")
    if not script.exists() or (found and os.path.samefile(found, script)):
        return "distill"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)
