"""Data sets of every format, and the errors of broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.config import DataConfig
from distill.data import Example, load_rows
from distill.errors import ConfigError
from tests.unit.data.builders import example


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(path: Path, **settings) -> list[Example]:
    return list(load_rows(DataConfig(path=str(path), **settings), Path("no-cache")).examples)


FORMATS = {
    "prompt_completion": (
        [{"prompt": "Hi é", "completion": "Yo"}, {"prompt": "A", "completion": "B"}],
        [example("u:Hi é", "a:Yo"), example("u:A", "a:B", row=1)],
    ),
    "messages": (
        [
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                    {"role": "user", "content": "R"},
                    {"role": "assistant", "content": "B"},
                ]
            }
        ],
        [example("s:S", "u:Q", "a:A", "u:R", "a:B")],
    ),
    "instruction": (
        [
            {"instruction": "Sum", "input": "1 2", "output": "3"},
            {"instruction": "Say", "input": "", "output": "x"},
        ],
        [example("u:Sum\n\n1 2", "a:3"), example("u:Say", "a:x", row=1)],
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_every_file(tmp_path, name, suffix):
    rows, expected = FORMATS[name]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    assert load(path) == expected
    assert load(path, format=name) == expected


def test_prompt_and_completion_as_turns(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "Q"}],
        "completion": [{"role": "assistant", "content": "A"}],
    }
    assert load(write_rows(tmp_path / "rows.jsonl", [row])) == [example("u:Q", "a:A")]


@pytest.mark.parametrize(
    "row", [{"prompt": "Q"}, {"prompt": "Q", "completion": None}, {"instruction": "Q", "input": None}]
)
def test_a_reference_can_be_missing(tmp_path, row):
    assert load(write_rows(tmp_path / "rows.jsonl", [row])) == [example("u:Q")]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [e.prompt[0].content for e in load(tmp_path / "rows.jsonl")] == ["a", "b"]


def test_a_hub_id_is_loaded_by_datasets(monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, split):
        calls.append((path, split))
        return datasets.Dataset.from_list([{"prompt": "Q", "completion": "A"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(DataConfig(path="owner/set", split="test"), Path()).examples == [example("u:Q", "a:A")]
    assert calls == [("owner/set", "test")]


@pytest.mark.parametrize("error", [ConnectionError, ValueError, "DatasetNotFoundError"])
def test_a_hub_id_that_fails_gives_a_one_line_error(monkeypatch, error):
    import datasets

    kind = getattr(datasets.exceptions, error) if isinstance(error, str) else error

    def load_dataset(path, split):
        raise kind("no such thing\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ConfigError, match=r"^data\.path=alpaca-dmo must .*: no such thing; did you mean alpaca-demo\?$"
    ):
        load_rows(DataConfig(path="alpaca-dmo"), Path())


def test_a_known_name_is_read_from_the_cache(tmp_path):
    with pytest.raises(ConfigError, match="run `distill data fetch alpaca-demo`"):
        load_rows(DataConfig(path="alpaca-demo"), tmp_path)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "alpaca-demo.json", FORMATS["instruction"][0])
    assert load_rows(DataConfig(path="alpaca-demo"), tmp_path).examples == FORMATS["instruction"][1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a",}', "line 17 must be JSON: Illegal trailing comma|line 17 must be JSON: Expecting property name"),
        (b'{"prompt": "a\x01"}', r"line 17 must be JSON: Invalid control character in column 14; correct the line$"),
        (b'{"prompt": "a', r"line 17 must be JSON: Unterminated string starting in column 12; correct the line$"),
        (b'["a"]', "line 17 must be a JSON object, not a list"),
        (b'{"prompt": "caf\xe9"}', "line 17 must be UTF-8, but byte 15 is not"),
    ],
)  # fmt: skip
def test_a_broken_line_is_reported_with_its_number(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' * 16 + line + b'\n{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.json", '[{"prompt": "a"},\n {"prompt" "b"}]', "line 2 must be JSON: Expecting ':' delimiter in column 12"),
        ("rows.json", '{"prompt": "a"}', "must be a JSON list of objects, not an object"),
        ("rows.json", '[{"prompt": "a"}, 3]', "row 2 must be a JSON object, not a number"),
        ("rows.parquet", "not parquet", "must be a Parquet file"),
        ("rows.jsonl", "\n", "must have at least one row; choose another data set"),
        ("rows.json", "[]", "must have at least one row; choose another data set"),
        ("rows.jsonl", '{"text": "a", "id": 3}', "must have a column messages or conversations or .*, or instruction, or prompt; it has text, id; name the columns"),
        ("rows.jsonl", '{"prompt": "a"}\n{"completion": "b"}', "row 2 must have a value in column prompt .*; it has completion"),
        ("rows.jsonl", '{"prompt": 3}', "row 1 column prompt must be text or a list of turns, not a number"),
        ("rows.jsonl", '{"messages": [{"role": "user"}]}', "turn 1 must have text as content, not null"),
        ("rows.jsonl", '{"messages": [["x"]]}', "turn 1 must have role and content"),
        ("rows.jsonl", '{"messages": [{"role": "narrator", "content": "x"}]}', "a known role .it has narrator.; use one of system,"),
        ("rows.jsonl", '{"prompt": "a", "completion": [{"role": "user", "content": "x"}]}', "an answer that begins with the assistant's turn, not the user's"),
        ("rows.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "must have a turn that the assistant answers"),
        ("rows.jsonl", '{"messages": []}', "must have a turn that the assistant answers"),
    ],
)  # fmt: skip
def test_broken_data_is_reported_with_its_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(ConfigError, match="must be a file that exists"):
        load(tmp_path / "nowhere.jsonl")
