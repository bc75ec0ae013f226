"""Reads data sets of any known format as examples: files, `datasets` ids, and data sets known by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.config import DataConfig
from distill.errors import NO_VALUE, ConfigError, did_you_mean, first_line

KNOWN_DATA: Mapping[str, str] = {"alpaca-demo": "data/alpaca-demo.json"}
"""Data sets that ``data.path`` can name -> their file in the cache."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a data set, independent of its format."""

    row: int
    """Row of the data set, from 0."""
    prompt: tuple[Turn, ...]
    """The turns before the assistant's first turn. At least one."""
    reference: tuple[Turn, ...] = ()
    """The assistant's first turn and all later ones; empty: no reference."""


# Loading


def load_rows(data: DataConfig, cache: Path) -> list[Example]:
    """Load all rows of ``data.path``.

    ``cache``: the folder that contains fetched data sets known by name.

    Raises: ConfigError with file and line, or with row and columns.
    """
    rows = _read_rows(data, cache)
    if not rows:
        raise ConfigError("data.path", data.path, "have at least one row", "choose another data set")
    name = data.format if data.format != "auto" else _detect_format(data.path, rows[0])
    read = _FORMATS[name].read
    examples = []
    for index, row in enumerate(rows):
        where = f"data.path={data.path} row {index}"
        missing = [column for column in _FORMATS[name].columns if row.get(column) is None]
        if missing:
            raise ConfigError(
                where,
                NO_VALUE,
                f"have a value in column {missing[0]} (format {name}); it has {_columns(row)}",
                "correct the row, or set data.format",
            )
        examples.append(_split_turns(index, read(row, where), where))
    return examples


def _read_rows(data: DataConfig, cache: Path) -> list[dict[str, Any]]:
    if data.path in KNOWN_DATA:
        path = cache / KNOWN_DATA[data.path]
        if not path.is_file():
            raise ConfigError(
                "data.path", data.path, "be fetched first", f"run `distill data fetch {data.path}`"
            )
        return _read_json(path)
    path = Path(data.path).expanduser()
    reader = _READERS.get(path.suffix)
    if reader is None:
        return _read_hub(data)
    if not path.is_file():
        raise ConfigError("data.path", data.path, "be a file that exists", "check the path")
    return reader(path)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_json_object(line, f"{path} line {number}"))
    return rows


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            where, NO_VALUE, f"be UTF-8, but byte {error.start} is not", "correct the line"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            where, NO_VALUE, f"be JSON: {error.msg} in column {error.colno}", "correct the line"
        ) from None
    return _as_object(row, where)


def _as_object(row: object, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(where, NO_VALUE, f"be a JSON object, not {_json_kind(row)}", "write {...}")
    return row


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            path, NO_VALUE, f"be UTF-8, but byte {error.start} is not", "convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} line {error.lineno}",
            NO_VALUE,
            f"be JSON: {error.msg} in column {error.colno}",
            "correct it, or name it .jsonl if it has one object per line",
        ) from None
    if not isinstance(rows, list):
        raise ConfigError(
            path, NO_VALUE, f"be a JSON list of objects, not {_json_kind(rows)}", "write [{...}, ...]"
        )
    return [_as_object(row, f"{path} row {index}") for index, row in enumerate(rows)]


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowException as error:
        raise ConfigError(
            path, NO_VALUE, f"be a Parquet file: {first_line(error)}", "check the file or write it again"
        ) from None


def _read_hub(data: DataConfig) -> list[dict[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return list(datasets.load_dataset(data.path, split=data.split))  # pyright: ignore[reportArgumentType, reportReturnType]
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        known = ", ".join(KNOWN_DATA)
        raise ConfigError(
            "data.path",
            data.path,
            f"be a .jsonl, .json or .parquet file, one of {known}, or a data set that `datasets` can load "
            f"(split {data.split}): {first_line(error)}",
            did_you_mean(data.path, KNOWN_DATA, "check the path and data.split"),
        ) from None


_READERS: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


# Formats


def _read_prompt_completion(row: Mapping[str, Any], where: str) -> list[Turn]:
    return [
        *_turns(row["prompt"], "user", f"{where} column prompt"),
        *_turns(row.get("completion"), "assistant", f"{where} column completion"),
    ]


def _read_messages(row: Mapping[str, Any], where: str) -> list[Turn]:
    return _turns(row["messages"], "user", f"{where} column messages")


def _read_instruction(row: Mapping[str, Any], where: str) -> list[Turn]:
    prompt = _turns(row["instruction"], "user", f"{where} column instruction")
    if row.get("input"):
        extra = _turns(row["input"], "user", f"{where} column input")
        prompt = [Turn(role="user", content="\n\n".join(turn.content for turn in [*prompt, *extra]))]
    return [*prompt, *_turns(row.get("output"), "assistant", f"{where} column output")]


def _turns(value: object, role: str, where: str) -> list[Turn]:
    """Return the turns of a column: text is one turn of ``role``, a list contains turns with roles, null is empty."""
    if value is None:
        return []
    if isinstance(value, str):
        return [Turn(role=role, content=value)]
    if not isinstance(value, list):
        raise ConfigError(
            where, NO_VALUE, f"be text or a list of turns, not {_json_kind(value)}", "correct the row"
        )
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise ConfigError(f"{where} turn {number}", NO_VALUE, "have role and content", "correct the row")
        content = turn.get("content")
        if not isinstance(content, str):
            raise ConfigError(
                f"{where} turn {number}",
                NO_VALUE,
                f"have text as content, not {_json_kind(content)}",
                "correct the row",
            )
        turns.append(Turn(role=turn["role"], content=content))
    return turns


def _split_turns(row: int, turns: Sequence[Turn], where: str) -> Example:
    first = next((number for number, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
    if first == 0:
        raise ConfigError(
            where, NO_VALUE, "have a turn before the assistant's first", "correct or remove the row"
        )
    return Example(row=row, prompt=tuple(turns[:first]), reference=tuple(turns[first:]))


@dataclass(frozen=True, kw_only=True)
class _Format:
    columns: tuple[str, ...]
    """Columns that a row must have; those of the reference can be null or missing."""
    read: Callable[[Mapping[str, Any], str], list[Turn]]


_FORMATS: Mapping[str, _Format] = {
    "messages": _Format(columns=("messages",), read=_read_messages),
    "prompt_completion": _Format(columns=("prompt",), read=_read_prompt_completion),
    "instruction": _Format(columns=("instruction",), read=_read_instruction),
}


def _detect_format(path: str, row: Mapping[str, Any]) -> str:
    for name, format_ in _FORMATS.items():
        if all(column in row for column in format_.columns):
            return name
    wanted = ", or ".join(format_.columns[0] for format_ in _FORMATS.values())
    raise ConfigError(
        "data.path", f"{path} row 0", f"have a column {wanted}; it has {_columns(row)}", "rename the columns"
    )


# Parts of messages


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "no column"


def _json_kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
