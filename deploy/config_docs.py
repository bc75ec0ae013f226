"""Generates docs/configuration.md from the docstrings in distill/config/.

    python -m deploy.config_docs > docs/configuration.md

A unit test compares the file with this output, so the two always agree.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import distill.config
from distill.config import RunConfig
from distill.config.tree import MAY_CHANGE, PLACES, WRITTEN_NAMES

_HEAD = """# Settings

`python -m deploy.config_docs` generates this page from `distill/config/`; do not edit it.

A YAML file contains the sections below, and `distill train FILE section.name=value` overrides a setting of the
file. A recipe can be given by name: `recipe: kd` in the file or `recipe=kd` on the command line loads the preset
`deploy/configs/recipes/kd.yaml`. `recipe: {{preset: kd, lm_weight: 0.3}}` loads it and changes one of its fields.

**Values** are read by the type of their setting. Text on the command line is taken as it is (`data.path=my data #1.jsonl`
needs quotes only for the shell); in a file it needs quotes only where YAML would end it, as at ` #`. A setting that can be
null is null if it is `null`, `~` or left empty; the text `null` itself can only be given in a file, in quotes. In a file,
`${{seed}}` stands for the value of another setting.

**Paths** (`run_dir`, `data.path` and the models) may begin with `~`. A relative path counts from the working directory, on
the command line as in a file. The names of models and data that can be fetched are never paths; other text is a path if
something exists there, or if it begins with `~`, `/`, `./` or `../`.

**A resumed run** (`distill train --resume RUN section.name=value`) keeps its settings, except for those of
`cluster` and `tracking` and these: {may_change}. These may name another place with the same content: {places}.
Its folder may be moved before.
"""


def config_docs() -> str:
    """Generate the whole page."""
    docs = _field_docs()
    parts = [
        _HEAD.format(may_change=_listed(MAY_CHANGE), places=_listed(PLACES)),
        *_section("top level", RunConfig(), "", docs),
    ]
    for field in fields(RunConfig):
        value = getattr(RunConfig(), field.name)
        if is_dataclass(value):
            parts += _section(field.name, value, f"{field.name}.", docs)
    return "\n".join(parts) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _section(title: str, part: Any, prefix: str, docs: dict[tuple[str, str], str]) -> list[str]:
    lines = [f"\n## {title}\n", f"{_markdown(type(part).__doc__ or '')}\n"]
    lines += ["| setting | default | meaning |", "|---|---|---|"]
    return lines + _rows(part, prefix, docs)


def _rows(part: Any, prefix: str, docs: dict[tuple[str, str], str]) -> list[str]:
    rows = []
    for field in fields(part):
        value = getattr(part, field.name)
        if is_dataclass(value):
            if prefix:  # a section within a section; sections of the top level have tables of their own
                rows += _rows(value, f"{prefix}{field.name}.", docs)
            continue
        name = WRITTEN_NAMES.get((type(part), field.name), field.name)
        meaning = _markdown(docs[type(part).__name__, field.name]).replace("|", "\\|")
        shown = _shown(value)
        choices = _choices(typing.get_type_hints(type(part))[field.name])
        if any(f"`{choice}`" not in meaning for choice in choices):
            meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `{prefix}{name}` | `{shown}` | {meaning} |")
    return rows


def _shown(value: object) -> str:
    """A default as YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _markdown(docstring: str) -> str:
    """A docstring on one line, with code in single backticks."""
    return " ".join(docstring.replace("``", "`").split())


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a setting with a fixed set of values, without null, which such a setting has as its default."""
    hints = [hint, *typing.get_args(hint)]
    return next((typing.get_args(part) for part in hints if typing.get_origin(part) is typing.Literal), ())


def _field_docs() -> dict[tuple[str, str], str]:
    """(class, field) -> the docstring below the field."""
    files = sorted(Path(distill.config.__file__).parent.glob("*.py"))
    nodes = [node for file in files for node in ast.parse(file.read_text()).body]
    docs: dict[tuple[str, str], str] = {}
    for node in nodes:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[node.name, statement.target.id] = str(after.value.value)
    return docs


if __name__ == "__main__":
    print(config_docs(), end="")
