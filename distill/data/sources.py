"""Reads the rows of a data set, whatever file or folder they are in, as plain Python values.

JSON is read line by line here, because messages must name the line and because the `datasets` library gives
every nested object the keys of all the others. CSV is read as text, because a reader that guesses types makes
numbers and nulls of answers such as "007" and "None". Everything else is read by `datasets`.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import NO_VALUE, ConfigError, did_you_mean, first_line

Row = dict[str, Any]

KNOWN_DATA: Mapping[str, str] = {"alpaca-demo": "data/alpaca-demo.json"}
"""Data sets that ``data.path`` can name -> their file in the cache."""

_COMPRESSED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_NOT_DATA = (".md", ".txt", ".yaml", ".yml", ".py", ".lock", ".gitattributes")
"""Files beside the shards of a folder."""
_READABLE = ".jsonl, .json, .csv, .tsv, .parquet and .arrow, and .gz, .bz2 and .xz of them"


def read_rows(name: str, split: str, cache: Path) -> list[Row]:
    """Read all rows of a data set.

    ``name``: one of :data:`KNOWN_DATA`, a file, a folder of files of one kind, a folder that
    ``Dataset.save_to_disk`` wrote, a pattern such as ``data/*.jsonl``, or the id of a data set for `datasets`.
    ``split``: of an id or a saved ``DatasetDict``. ``cache``: where fetched data sets are.

    Raises: ConfigError with the file and the line.
    """
    if name in KNOWN_DATA:
        path = cache / KNOWN_DATA[name]
        if not path.is_file():
            raise ConfigError("data.path", name, "be fetched first", f"run `distill data fetch {name}`")
        return _read_file(path)
    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, split)
    if matches := sorted(glob.glob(str(path))):
        return [row for match in matches for row in _read_file(Path(match))]
    if _kind(path) is not None or path.is_absolute() or glob.has_magic(name):
        raise ConfigError("data.path", name, "be a file that exists", "check the path")
    return _read_hub(name, split)


def _read_file(path: Path) -> list[Row]:
    kind = _kind(path)
    if kind is None:
        must = f"be of a kind that is read ({_READABLE})"
        raise ConfigError("data.path", path, must, "convert the file, or correct its ending")
    try:
        return list(_READERS[kind](path))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        must = f"be a readable file ({first_line(error)})"
        raise ConfigError("data.path", path, must, "check the file, or write it again") from None


def _kind(path: Path) -> str | None:
    """The ending that decides how a file is read, without that of a compression and in lower case."""
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    ending = Path(name).suffix
    return ending if ending in _READERS else None


def _read_folder(path: Path, split: str) -> list[Row]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _read_saved(path, split)
    shards = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        and file.suffix.lower() not in _NOT_DATA
    )
    if not shards:
        raise ConfigError("data.path", path, f"contain files that are read ({_READABLE})", "check the path")
    kinds = {_kind(file) for file in shards}
    if len(kinds) > 1:
        must = f"contain files of one kind (it has {', '.join(sorted({file.suffix for file in shards}))})"
        raise ConfigError("data.path", path, must, "name one of them with a pattern, such as folder/*.jsonl")
    return [row for shard in shards for row in _read_file(shard)]


def _read_saved(path: Path, split: str) -> list[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        must = f"be a folder that save_to_disk wrote ({first_line(error)})"
        raise ConfigError("data.path", path, must, "write it again") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            must = f"be one of {', '.join(map(str, saved))}, the splits of {path}"
            raise ConfigError("data.split", split, must, did_you_mean(split, map(str, saved)))
        saved = saved[split]
    return [_without_nulls(row) for row in saved]


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        known = ", ".join(KNOWN_DATA)
        raise ConfigError(
            "data.path",
            name,
            f"be a file or folder that exists, one of {known}, or a data set that `datasets` can load "
            f"(split {split}): {first_line(error)}",
            did_you_mean(name, KNOWN_DATA, "check the path and data.split"),
        ) from None
    return [_without_nulls(row) for row in loaded]  # pyright: ignore[reportArgumentType]


def _without_nulls(value: Any) -> Any:
    """Drop null members of nested objects: Arrow gives each object the keys of all objects of its column."""
    if isinstance(value, dict):
        return {name: _without_nulls(member) for name, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(member) for member in value]
    return value


# Kinds of files


def _opened(path: Path) -> IO[bytes]:
    opener = _COMPRESSED.get(path.suffix.lower())
    return opener(path, "rb") if opener else path.open("rb")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_object(line, f"{path} line {number}")


def _json_object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        must = f"be JSON: {error.msg} in column {error.colno}"
        raise ConfigError(where, NO_VALUE, must, "correct the line") from None
    return _as_object(row, where)


def _decoded(text: bytes, where: str | Path) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        must = f"be UTF-8, but byte {error.start} is not"
        raise ConfigError(where, NO_VALUE, must, "convert the text to UTF-8") from None


def _as_object(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(where, NO_VALUE, f"be a JSON object, not {json_kind(row)}", "write {...}")
    return row


def _read_json(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        text = _decoded(file.read(), path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        must = f"be JSON: {error.msg} in column {error.colno}"
        remedy = "correct it, or name it .jsonl if it has one object per line"
        raise ConfigError(f"{path} line {error.lineno}", NO_VALUE, must, remedy) from None
    if not isinstance(rows, list):
        must = f"be a JSON list of objects, not {json_kind(rows)}"
        raise ConfigError(path, NO_VALUE, must, "write [{...}, ...]")
    for index, row in enumerate(rows):
        yield _as_object(row, f"{path} row {index}")


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_separated(path, ",")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_separated(path, "\t")


def _read_separated(path: Path, separator: str) -> Iterator[Row]:
    with _opened(path) as file:
        text = _decoded(file.read(), path)
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                must = f"have {len(rows.fieldnames or ())} fields, as the header has"
                raise ConfigError(
                    f"{path} line {rows.line_num}", NO_VALUE, must, "quote the field that is split"
                )
            yield row
    except csv.Error as error:
        raise ConfigError(
            f"{path} line {rows.line_num}", NO_VALUE, f"be CSV: {error}", "correct it"
        ) from None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        with _opened(path) as file:
            rows = pq.read_table(pa.BufferReader(file.read())).to_pylist()
    except pa.ArrowException as error:
        must = f"be a Parquet file: {first_line(error)}"
        raise ConfigError(path, NO_VALUE, must, "check the file or write it again") from None
    yield from map(_without_nulls, rows)


def _read_arrow(path: Path) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.Dataset.from_file(str(path))
    except (pa.ArrowException, OSError) as error:
        must = f"be an Arrow file: {first_line(error)}"
        raise ConfigError(path, NO_VALUE, must, "check the file or write it again") from None
    yield from map(_without_nulls, rows)


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def json_kind(value: object) -> str:
    """The kind of a value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
