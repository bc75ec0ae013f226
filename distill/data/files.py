"""Reads the rows of one file as plain Python values, whatever kind of file it is.

JSON is read line by line here, because messages must name the line and because the `datasets` library gives
every nested object the keys of all the others. CSV is read as text, because a reader that guesses types makes
numbers and nulls of answers such as "007" and "None". Arrow is read by `datasets`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.data.rejections import Rejections
from distill.errors import NO_VALUE, ConfigError, first_line
from distill.files import NOT_AS_WRITTEN

Row = dict[str, Any]


def _open_zst(path: Path, mode: str) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))  # pyright: ignore[reportArgumentType]


_COMPRESSED: Mapping[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
LONGEST_LINE_BYTES = 16 << 20
"""Of a line of JSON, and of a field of CSV. A longer one takes several times its size in memory until its text has
become tokens, and is usually a whole data set without line ends."""
_LONGEST_REASON = 300
READABLE = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet and .arrow, and .gz, .bz2, .xz and .zst of them"
"""The endings of the files that are read, in words."""


def read_file(path: Path) -> list[Row]:
    """Read all rows of a file.

    Raises: ConfigError with the file, and with the line where there are lines; it counts the rows that break a rule.
    """
    kind = kind_of(path)
    if kind is None:
        must = f"be of a kind that is read ({READABLE})"
        raise ConfigError("data.path", path, must, "convert the file, or correct its ending")
    try:
        return list(_READERS[kind](path))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        must = f"be a readable file ({first_line(error)})"
        raise ConfigError("data.path", path, must, "check the file, or write it again") from None


def kind_of(path: Path) -> str | None:
    """The ending that decides how a file is read, without that of a compression and in lower case."""
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    ending = Path(name).suffix
    return ending if ending in _READERS else None


def without_nulls(value: Any) -> Any:
    """Drop null members of nested objects: Arrow gives each object the keys of all objects of its column."""
    if isinstance(value, dict):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    if isinstance(value, list):
        return [without_nulls(member) for member in value]
    return value


# Kinds of files


def _opened(path: Path) -> IO[bytes]:
    opener = _COMPRESSED.get(path.suffix.lower())
    return opener(path, "rb") if opener else path.open("rb")


def _read_jsonl(path: Path) -> Iterator[Row]:
    refused, num_read = Rejections(), 0
    with _opened(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if line is not None and not line.strip():
                continue
            num_read += 1
            where = f"{path} line {number}"
            try:
                if line is None:
                    raise _too_long(where)
                row = _json_object(line.rstrip(b"\r\n"), where)
            except ConfigError as error:
                refused.add(error)
                continue
            if refused.first is None:  # otherwise no row is used
                yield row
    refused.require_none(num_read)


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long, which is not kept in memory."""
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        if len(line) <= LONGEST_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        del line
        while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass
        yield None


def _too_long(where: str) -> ConfigError:
    must = f"be at most {LONGEST_LINE_BYTES >> 20} MiB long, because no prompt is longer"
    return ConfigError(where, NO_VALUE, must, "put each row in a line of its own, or remove the row")


def _json_object(line: bytes, where: str) -> Row:
    try:
        row = _loads(_decoded(line, where), where)
    except json.JSONDecodeError as error:
        must = f"be JSON: {json_problem(error)} in column {error.colno}"
        raise ConfigError(where, NO_VALUE, must, "correct the line") from None
    return _as_object(row, where)


def _loads(text: str, where: str | Path) -> Any:
    """JSON in which no object has a name twice, because one of the two values would be lost.

    Raises: ConfigError; JSONDecodeError.
    """

    def unique(members: list[tuple[str, Any]]) -> Row:
        _require_unique([name for name, _ in members], where)
        return dict(members)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ConfigError, json.JSONDecodeError):
        raise
    except (RecursionError, ValueError) as error:  # thousands of brackets or of digits
        raise ConfigError(
            where, NO_VALUE, f"be JSON of a usual size ({first_line(error)})", "correct it"
        ) from None


def _require_unique(names: Iterable[str], where: str | Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            where, NO_VALUE, f"have each name once, but {twice[0]} is there twice", "rename one"
        )


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
        rows = _loads(text, path)
    except json.JSONDecodeError as error:
        must = f"be JSON: {json_problem(error)} in column {error.colno}"
        remedy = "correct it, or name it .jsonl if it has one object per line"
        raise ConfigError(f"{path} line {error.lineno}", NO_VALUE, must, remedy) from None
    if not isinstance(rows, list):
        must = f"be a JSON list of objects, not {json_kind(rows)}"
        raise ConfigError(path, NO_VALUE, must, "write [{...}, ...]")
    refused = Rejections()
    for number, row in enumerate(rows, 1):
        try:
            found = _as_object(row, f"{path} row {number}")
        except ConfigError as error:
            refused.add(error)
            continue
        yield found
    refused.require_none(len(rows))


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_separated(path, ",")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_separated(path, "\t")


def _read_separated(path: Path, separator: str) -> Iterator[Row]:
    with _opened(path) as file:
        text = _decoded(file.read(), path)
    csv.field_size_limit(LONGEST_LINE_BYTES)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        _require_unique(rows.fieldnames or (), f"{path} line 1")
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
    with _of_kind(path, "a Parquet file"):
        with _opened(path) as file:
            source = pa.BufferReader(file.read())
        table = pq.ParquetFile(source, page_checksum_verification=True).read()
        table.validate(full=True)  # wrong offsets would have text read from elsewhere
        _require_unique(table.column_names, path)
        rows = table.to_pylist()
    yield from map(without_nulls, rows)


def _read_arrow(path: Path) -> Iterator[Row]:
    import datasets

    with _of_kind(path, "an Arrow file"):
        rows = datasets.Dataset.from_file(str(path))
        rows.data.validate(full=True)
        _require_unique(rows.column_names, path)
        found = [without_nulls(row) for row in rows]
    yield from found


@contextmanager
def _of_kind(path: Path, kind: str) -> Iterator[None]:
    """Raises: ConfigError for what the libraries raise when a file is damaged, which is nearly anything."""
    try:
        yield
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, OverflowError, MemoryError, *NOT_AS_WRITTEN) as error:
        must = f"be {kind}: {first_line(error)[:_LONGEST_REASON]}"
        raise ConfigError(path, NO_VALUE, must, "check the file or write it again") from None


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def json_problem(error: json.JSONDecodeError) -> str:
    """What is wrong with JSON text, as words that a place can follow: some of Python's end with "at"."""
    return error.msg.removesuffix(" at")


def json_kind(value: object) -> str:
    """The kind of a value, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    kinds |= {int: "a number", float: "a number"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")
