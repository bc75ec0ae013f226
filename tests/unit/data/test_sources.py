"""Every kind of file is read to the same rows, and other files are refused in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.data.sources import read_rows
from distill.errors import ConfigError

ROWS = [{"prompt": "Count, to 3", "completion": 'one "two" three'}, {"prompt": "é\nNA", "completion": "007"}]


def jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def separated(path: Path, separator: str) -> None:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [separator.join(row) for row in [("prompt", "completion")]]
    lines += [separator.join(map(quoted, row.values())) for row in ROWS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compressed(opener: Callable[..., object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with opener(path, "wb") as file:  # type: ignore[attr-defined]
            file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())

    return write


def zstd(path: Path) -> None:
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ROWS).encode())


def folder_of_shards(path: Path) -> None:
    (path / "deep").mkdir(parents=True)
    for number, row in enumerate(ROWS):
        (path / "deep" / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n")
    (path / "README.md").write_text("about")
    (path / ".cache").mkdir()
    (path / ".cache" / "x.csv").write_text("a,b\n")


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": jsonl,
    "ROWS.JSONL": jsonl,
    "rows.ndjson": jsonl,
    "mes données #1 (été).jsonl": jsonl,
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.csv": lambda path: separated(path, ","),
    "rows.tsv": lambda path: separated(path, "\t"),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.jsonl.gz": compressed(gzip.open),
    "rows.JSONL.GZ": compressed(gzip.open),
    "rows.jsonl.bz2": compressed(bz2.open),
    "rows.jsonl.xz": compressed(lzma.open),
    "rows.jsonl.zst": zstd,
    "shards": folder_of_shards,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS)}
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert read_rows(str(tmp_path / name), "train", tmp_path) == ROWS


def test_arrow_files_of_a_saved_set_are_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert read_rows(str(file), "train", tmp_path) == ROWS


def test_patterns_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of_shards(tmp_path / "shards")
    assert read_rows("~/shards/deep/part-*.jsonl", "train", tmp_path) == ROWS


def test_a_saved_split_can_be_chosen(tmp_path: Path) -> None:
    WRITERS["splits"](tmp_path / "splits")
    assert read_rows(str(tmp_path / "splits"), "test", tmp_path) == ROWS[:1]
    with pytest.raises(
        ConfigError, match=r"^data\.split=trian must be one of test, train, .*did you mean train"
    ):
        read_rows(str(tmp_path / "splits"), "trian", tmp_path)


def test_nested_nulls_of_arrow_are_not_data(tmp_path: Path) -> None:
    calls = [{"arguments": {"town": "x"}}, {"arguments": {"day": 3}}]
    pq.write_table(pa.Table.from_pylist([{"call": call} for call in calls]), tmp_path / "rows.parquet")
    assert [row["call"] for row in read_rows(str(tmp_path / "rows.parquet"), "train", tmp_path)] == calls


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("rows.docx", "x", r"must be of a kind that is read \(\.jsonl, \.ndjson, \.json, \.csv"),
        ("rows", "x", "must be of a kind that is read"),
        ("rows.csv", "prompt,completion\na,b,c\n", "line 2 must have 2 fields, as the header has"),
        ("rows.csv", 'prompt\n"a', "must be CSV"),
        ("rows.jsonl.gz", "plain", "must be a readable file"),
        ("rows.jsonl.zst", "plain", "must be a readable file"),
        ("rows.arrow", "x", "must be an Arrow file"),
        (
            "rows.jsonl",
            '{"prompt": "a", "prompt": "b"}',
            "line 1 must have each name once, but prompt is there twice",
        ),
        ("rows.json", '[{"prompt": [{"a": 1, "a": 2}]}]', "must have each name once, but a is there twice"),
        ("rows.csv", "prompt,prompt\na,b\n", "line 1 must have each name once, but prompt is there twice"),
        ("rows.jsonl", "[" * 100_000, "line 1 must be JSON of a usual size"),
        ("rows.jsonl", '{"n": ' + "1" * 5000 + "}", "line 1 must be JSON of a usual size"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, name: str, contents: str, message: str) -> None:
    (tmp_path / name).write_text(contents)
    with pytest.raises(ConfigError, match=message) as caught:
        read_rows(str(tmp_path / name), "train", tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="must contain files that are read"):
        read_rows(str(tmp_path / "empty"), "train", tmp_path)
    jsonl(tmp_path / "empty" / "a.jsonl")
    separated(tmp_path / "empty" / "b.csv", ",")
    with pytest.raises(
        ConfigError, match=r"must contain files of one kind \(it has \.csv, \.jsonl\); name one of"
    ):
        read_rows(str(tmp_path / "empty"), "train", tmp_path)
    assert read_rows(str(tmp_path / "empty" / "*.jsonl"), "train", tmp_path) == ROWS  # as the remedy says


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match="must have each name once, but prompt is there twice"):
        read_rows(str(tmp_path / "rows.parquet"), "train", tmp_path)


@pytest.mark.parametrize("folder", ["plain", "[a] é"])
@pytest.mark.parametrize(
    ("training", "test"),
    [
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train.jsonl", "test.jsonl"),
        ("train/rows.jsonl", "test/rows.jsonl"),
    ],
)
def test_a_folder_is_read_by_split(tmp_path: Path, folder: str, training: str, test: str) -> None:
    base = tmp_path / folder
    for name, row in ((training, ROWS[0]), (test, ROWS[1])):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(json.dumps(row))
    (base / "dataset_infos.json").write_text("{}")
    assert read_rows(str(base), "train", tmp_path) == ROWS[:1]
    assert read_rows(str(base), "test", tmp_path) == ROWS[1:]
    with pytest.raises(ConfigError, match=r"^data\.split=validation must be one of t.*, the splits of "):
        read_rows(str(base), "validation", tmp_path)


def test_a_file_beside_the_splits_is_not_left_out_in_silence(tmp_path: Path) -> None:
    for name in ("train", "test", "rows"):
        jsonl(tmp_path / f"{name}.jsonl")
    with pytest.raises(
        ConfigError, match=r"each file in a split \(train, test\), but rows\.jsonl is in none"
    ):
        read_rows(str(tmp_path), "train", tmp_path)
    assert read_rows(str(tmp_path / "*.jsonl"), "train", tmp_path) == ROWS * 3  # as the remedy says


def test_a_missing_file_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nohome")
    for name, shown in {
        "nope.jsonl": f"{tmp_path}/nope.jsonl", "~/nope.jsonl": "/nohome/nope.jsonl", "~nouser/x": "~nouser/x",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            read_rows(name, "train", tmp_path)
        assert str(caught.value) == f"data.path={shown} must be a file that exists; check the path"


def test_a_missing_file_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in (
        "nowhere.jsonl",
        str(tmp_path / "nowhere"),
        "nowhere/*.csv",
        "~nouser/x",
        f"{tmp_path}/fold*",
    ):
        with pytest.raises(ConfigError, match="must be a file that exists"):
            read_rows(name, "train", tmp_path)
