"""Data sets: every row is read as it was meant, or the error counts the rows that were not."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.config import DataConfig
from distill.data import LoadedRows, load_rows
from distill.data import files as files_module
from distill.errors import ConfigError
from tests.unit.bad_input.outcome import cases, outcome_of

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda text: text.strip() and not text.lstrip().startswith("[")
)
GOOD = st.fixed_dictionaries({"prompt": TEXT, "completion": st.one_of(TEXT, st.just(""), st.none())})
NOT_TEXT = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.just({}), st.just({"a": "b"}), st.just([3])
)
RAW_BAD = [
    b'{"prompt": "a"', b"{'prompt': 'a'}", b'{"prompt": "a\0b"}', b'{"prompt": "caf\xe9"}', b"\xff\xfe{\0}\0", b"nonsense",
    b'["prompt", "a"]', b"3", b"null", b'"prompt"', b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a"} {"prompt": "b"}',
    b'{"prompt": "a\\ud800"}', b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": ' + b"[" * 20000 + b"}", b"{]",
]  # fmt: skip
"""Lines that are no JSON object with text in UTF-8."""
BAD_ROWS: st.SearchStrategy[Any] = st.one_of(
    st.fixed_dictionaries({"prompt": NOT_TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": NOT_TEXT}),
    st.fixed_dictionaries({"prompt": st.sampled_from(["", " ", "\n", None]), "completion": TEXT}),
    st.fixed_dictionaries({"completion": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "output": TEXT}),
    st.fixed_dictionaries({"prompt": st.just([{"role": "assistant", "content": "no question"}])}),
)
"""Rows that are JSON objects, but of which no prompt and answer follow."""


def read(path: Path, **settings: Any) -> LoadedRows:
    return load_rows(DataConfig(path=str(path), **settings), path.parent)


def meant(row: dict[str, Any]) -> tuple[str, str | None]:
    """The prompt and the reference of a good row; an answer without text is dropped."""
    answer = row["completion"]
    return row["prompt"], answer if answer and answer.strip() else None


def found(loaded: LoadedRows) -> list[tuple[str, str | None]]:
    return [
        ("".join(turn.content for turn in e.prompt), "".join(t.content for t in e.reference) or None)
        for e in loaded.examples
    ]


@cases(150)
@given(st.lists(st.tuples(st.booleans(), GOOD, st.sampled_from(RAW_BAD)), min_size=1, max_size=6))
def test_lines_that_are_not_json(tmp_path: Path, lines: list[tuple[bool, dict[str, Any], bytes]]):
    path = tmp_path / "rows.jsonl"
    written = [json.dumps(row).encode() if good else bad for good, row, bad in lines]
    path.write_bytes(b"\n".join(written) + b"\n")
    outcome = outcome_of(lambda: read(path))
    bad = [number for number, (good, _, _) in enumerate(lines, 1) if not good]
    if not bad:
        assert outcome.accepted is not None
        assert found(outcome.accepted) == [meant(row) for _, row, _ in lines]
        return
    assert isinstance(outcome.error, ConfigError)
    surrogates = [number for number in bad if b"ud800" in lines[number - 1][2]]
    if syntax := [number for number in bad if number not in surrogates]:
        assert f"line {syntax[0]}" in outcome.error.name
        bad = syntax
    if len(bad) > 1:
        assert f"{len(bad)} of {len(lines)} rows are refused (" in outcome.error.remedy


@cases(150)
@given(
    st.lists(
        st.one_of(GOOD.map(lambda row: (True, row)), BAD_ROWS.map(lambda row: (False, row))), max_size=6
    ),
    st.data(),
)
def test_rows_of_wrong_types(tmp_path: Path, rows: list[tuple[bool, dict[str, Any]]], data: st.DataObject):
    rows = [(True, {"prompt": "first", "completion": "answer"}), *rows]  # the columns of the data set
    path = tmp_path / data.draw(st.sampled_from(["rows.jsonl", "rows.json", "rows.jsonl.gz"]))
    text = json.dumps([row for _, row in rows])
    if "jsonl" in path.name:
        text = "".join(json.dumps(row) + "\n" for _, row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    outcome = outcome_of(lambda: read(path))
    bad = [number for number, (good, _) in enumerate(rows, 1) if not good]
    if not bad:
        assert outcome.accepted is not None
        assert found(outcome.accepted) == [meant(row) for _, row in rows]
        return
    assert isinstance(outcome.error, ConfigError)
    assert re.search(rf"\brow {bad[0]}\b", outcome.error.name), outcome.error
    counted = re.search(r"(\d+) of (\d+) rows are refused \((.*)\)$", outcome.error.remedy)
    assert (counted is None) == (len(bad) == 1)
    if counted is not None:
        assert (int(counted[1]), int(counted[2])) == (len(bad), len(rows))
        by_rule = [int(number) for number in re.findall(r"(\d+) (?:must|break)", counted[3])]
        assert sum(by_rule) == len(bad), "every refused row is counted under one rule"


@cases(60)
@given(st.binary(max_size=80), st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "csv.bz2", "json.xz", "jsonl.zst"]))  # fmt: skip
def test_any_bytes(tmp_path: Path, content: bytes, ending: str):
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    outcome = outcome_of(lambda: read(path))
    assert outcome.error is None or isinstance(outcome.error, ConfigError)


@cases(60)
@given(
    st.lists(GOOD, min_size=1, max_size=4),
    st.integers(0, 400),
    st.binary(max_size=4),
    st.sampled_from(["parquet", "arrow"]),
)
def test_a_file_of_columns_that_was_cut_or_changed(
    tmp_path: Path, rows: list[dict[str, Any]], at: int, by: bytes, kind: str
):
    """Neither format has checksums by itself, so that only the structure is checked, and not each byte of a text."""
    path = tmp_path / f"rows.{kind}"
    table = pa.Table.from_pylist(rows, pa.schema([("prompt", pa.string()), ("completion", pa.string())]))
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    content = path.read_bytes()
    place = at % len(content)
    path.write_bytes(
        content[:place] + by if len(by) % 2 else content[:place] + by + content[place + len(by) :]
    )
    outcome = outcome_of(lambda: read(path))
    assert outcome.error is None or isinstance(outcome.error, ConfigError)


@cases(40)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.sampled_from([",", "\t"]))
def test_separated_values_come_back(tmp_path: Path, rows: list[tuple[str, str]], separator: str):
    """Quoted text with separators, quotes and line ends; a row with one field too few is refused."""
    path = tmp_path / ("rows.csv" if separator == "," else "rows.tsv")
    lines = [
        [f'"{text.replace(chr(34), chr(34) * 2)}"' for text in row]
        for row in [("prompt", "completion"), *rows]
    ]
    path.write_bytes("".join(separator.join(line) + "\r\n" for line in lines).encode())
    outcome = outcome_of(lambda: read(path))
    assert outcome.accepted is not None and found(outcome.accepted) == [(a, b) for a, b in rows]
    path.write_bytes("".join(separator.join(line) + "\r\n" for line in [*lines, ['"alone"']]).encode())
    assert "must have 2 fields" in str(outcome_of(lambda: read(path)).error)


def test_equal_ids_and_equal_prompts_are_all_kept(tmp_path: Path):
    """A column ``id`` is not read: the warning of the doctor names it. Equal prompts are counted later."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "a"}\n')
    loaded = read(path)
    assert found(loaded) == [("a", None), ("a", None)] and loaded.unused_columns == {"id": 2}


# Long lines


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv"])
@pytest.mark.parametrize("over", [0, 1])
def test_the_longest_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, over: int):
    monkeypatch.setattr(files_module, "LONGEST_LINE_BYTES", 1000)
    path = tmp_path / f"rows.{ending}"
    if ending == "csv":
        text = f"prompt\n{'x' * (1000 + over)}\nshort\n"
    else:
        shell = '{"prompt": ""}'
        text = f'{{"prompt": "{"x" * (1000 - len(shell) + over)}"}}\n{{"prompt": "short"}}\n'
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    outcome = outcome_of(lambda: read(path))
    if over:
        assert outcome.error is not None and (
            "line 1" in outcome.error.name or "line 2" in outcome.error.name
        )
    else:
        assert outcome.accepted is not None and len(outcome.accepted.examples) == 2


MEASURED = """
import resource, sys
from pathlib import Path
from distill.config import DataConfig
from distill.data import load_rows
from distill.errors import ConfigError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_rows(DataConfig(path=sys.argv[1]), Path())
except ConfigError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_line_of_100_megabytes_is_refused_without_reading_it_whole(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"prompt": "a"}\n{"prompt"}\n')
    command = [sys.executable, "-c", MEASURED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    line, kibibytes = done.stdout.splitlines()
    assert "line 1 must be at most 16 MiB long" in line
    assert "2 of 3 rows are refused (1 must be at most 16 MiB long, 1 must be JSON)" in line
    assert int(kibibytes) < 64 << 10, "several times the limit, and less than the line"
