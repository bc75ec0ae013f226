"""Finds the files of a data set, and reads the rows of all of them as plain Python values."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from distill.data.files import READABLE, Row, kind_of, read_file, without_nulls
from distill.errors import ConfigError, did_you_mean, first_line
from distill.files import NOT_AS_WRITTEN, is_plain_name

KNOWN_DATA: Mapping[str, str] = {"alpaca-demo": "data/alpaca-demo.json"}
"""Data sets that ``data.path`` can name -> their file in the cache."""

_NOT_DATA = (".md", ".txt", ".yaml", ".yml", ".py", ".lock", ".gitattributes")
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")
"""Endings and names of files beside the shards of a folder."""


def read_rows(name: str, split: str, cache: Path) -> list[Row]:
    """Read all rows of a data set.

    ``name``: one of :data:`KNOWN_DATA`, a file, a folder of files of one kind, a folder that
    ``Dataset.save_to_disk`` wrote, a pattern such as ``data/*.jsonl``, or the id of a data set for `datasets`.
    ``split``: of everything that has splits. ``cache``: where fetched data sets are.

    Raises: ConfigError with the file and the line.
    """
    path = Path(os.path.expanduser(name))
    if name not in KNOWN_DATA and path.is_dir() and _is_saved(path):
        return _read_saved(path.absolute(), split)
    files = data_files(name, split, cache)
    return _read_hub(name, split) if files is None else [row for file in files for row in read_file(file)]


def data_files(name: str, split: str, cache: Path) -> list[Path] | None:
    """The files that :func:`read_rows` reads for the same arguments, in order; None for the id of a data set.

    Raises: ConfigError.
    """
    if name in KNOWN_DATA:
        path = cache / KNOWN_DATA[name]
        if not path.is_file():
            raise ConfigError("data.path", name, "be fetched first", f"run `distill data fetch {name}`")
        return [path]
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_saved(path) if _is_saved(path) else _files_of_folder(path.absolute(), split)
    if matches := [
        file for file in map(Path, sorted(glob.glob(str(path), recursive=True))) if file.is_file()
    ]:
        return matches
    if kind_of(path) is not None or path.is_absolute() or name.startswith("~") or glob.has_magic(name):
        missing = name if str(path).startswith("~") else path.absolute()
        raise ConfigError("data.path", missing, "be a file that exists", "check the path")
    return None


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _files_of_saved(folder: Path) -> list[Path]:
    """The files that ``save_to_disk`` wrote, without the results that `datasets` caches beside them."""
    return sorted(
        file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(("cache-", "."))
    )


def _files_of_folder(path: Path, split: str) -> list[Path]:
    shards = sorted(file for file in path.rglob("*") if _is_shard(file, path))
    if not shards:
        raise ConfigError("data.path", path, f"contain files that are read ({READABLE})", "check the path")
    shards = _shards_of_split(path, shards, split)
    kinds = {kind_of(file) for file in shards}
    if len(kinds) > 1:
        must = f"contain files of one kind (it has {', '.join(sorted({file.suffix for file in shards}))})"
        raise ConfigError("data.path", path, must, "name one of them with a pattern, such as folder/*.jsonl")
    return shards


def _is_shard(file: Path, folder: Path) -> bool:
    is_hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
    is_about = file.suffix.lower() in _NOT_DATA or file.name in _ABOUT_DATA
    return not is_hidden and not is_about and file.is_file()


def _shards_of_split(folder: Path, shards: Sequence[Path], split: str) -> list[Path]:
    """The files of a split, by the rules with which `datasets` finds splits in names (train-00000-of-00002).

    Raises: ConfigError when there is no such split, or a file belongs to none.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = glob.escape(str(folder))
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    splits = {str(name): set(map(Path, files)) for name, files in found.items()}
    _require_split(split, splits, folder)
    in_none = sorted(set(shards).difference(*splits.values()))
    if in_none:
        must = (
            f"have each file in a split ({', '.join(splits)}), but {in_none[0].name} is in none by its name"
        )
        raise ConfigError("data.path", folder, must, "name the files with a pattern, such as folder/*.jsonl")
    return [file for file in shards if file in splits[split]]


def _require_split(split: str, splits: Iterable[object], folder: Path) -> None:
    names = [str(name) for name in splits]
    if split not in names:
        must = f"be one of {', '.join(names)}, the splits of {folder}"
        remedy = did_you_mean(
            split, names, f"set it to {names[0]}" if len(names) == 1 else "choose one of them"
        )
        raise ConfigError("data.split", split, must, remedy)


def _require_own_files(folder: Path) -> None:
    """Require that what a saved folder names lies in it: `datasets` joins names, and would follow ``../x``.

    Raises: ConfigError.
    """
    try:
        if (folder / "dataset_dict.json").exists():
            parts = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            states = [folder / part / "state.json" for part in parts if is_plain_name(part)]
        else:
            parts, states = [], [folder / "state.json"]
        files = [
            file["filename"] for state in states for file in json.loads(state.read_text())["_data_files"]
        ]
    except (OSError, *NOT_AS_WRITTEN) as error:
        must = f"be a folder that save_to_disk wrote ({first_line(error)})"
        raise ConfigError("data.path", folder, must, "write it again") from None
    for name in (*parts, *files):
        if not is_plain_name(name):
            must = f"name only files of its own (it names {name!r:.80})"
            raise ConfigError("data.path", folder, must, "write it again with save_to_disk")


def _read_saved(path: Path, split: str) -> list[Row]:
    import datasets

    _require_own_files(path)
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException, *NOT_AS_WRITTEN) as error:
        must = f"be a folder that save_to_disk wrote ({first_line(error)})"
        raise ConfigError("data.path", path, must, "write it again") from None
    if isinstance(saved, datasets.DatasetDict):
        _require_split(split, saved, path)
        saved = saved[split]
    return [without_nulls(row) for row in saved]


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
    return [without_nulls(row) for row in loaded]  # pyright: ignore[reportArgumentType]
