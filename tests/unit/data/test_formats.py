"""Every format of docs/data.md is read; every part of a row is read, reported or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from distill.config import DataConfig
from distill.data import Example, LoadedRows, load_rows
from distill.errors import ConfigError

DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"
DOCUMENTED = dict(re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|$", DOCUMENT.read_text(), re.MULTILINE))
PLAIN = ([("user", "Say hi.")], [("assistant", "Hi.")])
EXPECTED = {
    "prompt and completion": PLAIN,
    "the same as turns (TRL)": PLAIN,
    "messages (OpenAI, UltraChat)": PLAIN,
    "messages with parts": PLAIN,
    "messages as JSON text": PLAIN,
    "ShareGPT": PLAIN,
    "UltraChat, first edition": PLAIN,
    "Alpaca": PLAIN,
    "Alpaca with system text and history": (
        [("system", "Be brief."), ("user", "Say hi."), ("assistant", "Hello."), ("user", "And again?")],
        [("assistant", "Hi.")],
    ),
    "Dolly": ([("user", "Say hi.\n\nIn English.")], [("assistant", "Hi.")]),
    "MiniLLM's Dolly": PLAIN,
    "tools (OpenAI)": (
        [("user", "Time?")],
        [("assistant", ""), ("tool", "noon"), ("assistant", "It is noon.")],
    ),
    "tools (ShareGPT)": (
        [("user", "Time?")],
        [("assistant", ""), ("tool", "noon"), ("assistant", "It is noon.")],
    ),
}


def load(folder: Path, *rows: dict, **settings: str) -> LoadedRows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(DataConfig(path=str(path), **settings), Path("no-cache"))  # type: ignore[arg-type]


def turns(example: Example) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    prompt, reference = (
        [(turn.role, turn.content) for turn in part] for part in (example.prompt, example.reference)
    )
    return prompt, reference


def test_the_document_shows_what_is_tested() -> None:
    assert set(DOCUMENTED) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_documented_row_is_read(tmp_path: Path, name: str) -> None:
    (example,) = load(tmp_path, json.loads(DOCUMENTED[name])).examples
    assert turns(example) == EXPECTED[name]
    if name.startswith("tools"):
        assert len(example.tools) == 1
        (call,) = example.reference[0].details["tool_calls"]
        assert call["function"] == {"name": "clock", "arguments": {}}


def test_columns_that_are_not_read_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "context": "c", "note": None},
        {"prompt": "a", "completion": "b", "context": "d", "extra": [1]},
    ]
    loaded = load(tmp_path, *rows)
    assert loaded.unused_columns == {"context": 2, "extra": 1}
    assert (loaded.format, "system" in loaded.possible_columns) == ("prompt_completion", True)
    assert "2 with a reference" in loaded.summary()


def test_a_column_that_only_a_later_row_has_is_read(tmp_path: Path) -> None:
    loaded = load(tmp_path, {"instruction": "a"}, {"instruction": "b", "system": "S", "output": "x"})
    assert turns(loaded.examples[1]) == ([("system", "S"), ("user", "b")], [("assistant", "x")])


@pytest.mark.parametrize("answer", ["", "  \n", None])
def test_an_empty_answer_is_no_reference(tmp_path: Path, answer: str | None) -> None:
    loaded = load(tmp_path, {"prompt": "a", "completion": answer})
    assert loaded.examples[0].reference == ()
    assert "0 with a reference" in loaded.summary()
    assert ("1 with an empty answer" in loaded.summary()) == (answer is not None)


def test_the_summary_counts_systems_tools_and_turns(tmp_path: Path) -> None:
    rows = [
        json.loads(DOCUMENTED["tools (OpenAI)"]),
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]},
    ]
    text = load(tmp_path, *rows).summary()
    assert "1 with a system turn" in text and "1 with tools or tool turns" in text


def test_columns_can_be_named(tmp_path: Path) -> None:
    row = {"question": "a", "reply": "b"}
    with pytest.raises(ConfigError, match=r"data\.prompt_column and data\.answer_column$"):
        load(tmp_path, row)
    loaded = load(tmp_path, row, prompt_column="question", answer_column="reply")
    assert turns(loaded.examples[0]) == ([("user", "a")], [("assistant", "b")])
    assert loaded.unused_columns == {}
    with pytest.raises(
        ConfigError, match=r"data\.answer_column=replies must be a column of .*, which has question, reply"
    ):
        load(tmp_path, row, prompt_column="question", answer_column="replies")
    with pytest.raises(ConfigError, match=r"data\.prompt_column=null must be set together"):
        load(tmp_path, row, answer_column="reply")


USER = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "turn 1 must have text as content, not null",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "must have parts of text only, not image_url",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
            "must have tool calls of the form",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "A", "thoughts": "T"}]},
            r"no parts beside its text that would be lost \(it has thoughts\)",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "A", "weight": 0}]}, "must count in the loss"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "must be JSON"),
        ({"tools": "{}", "messages": [USER]}, "column tools must be a JSON list, not an object"),
        (
            {"system": "S", "messages": [{"role": "system", "content": "T"}, USER]},
            "must have one system text",
        ),
        ({"prompt": "Say \ud83d please."}, r"character 4 is half of a pair \(\\ud83d\)"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "half of a pair"),
        ({"prompt": "a", "history": [["b", "\ud83d"]]}, "half of a pair"),
    ],
)
def test_what_would_be_lost_is_refused_with_its_row(tmp_path: Path, row: dict, message: str) -> None:
    good = {"messages": [USER]} if "messages" in row else {"prompt": "fine"}
    rows = [row] if "conversations" in row else [good, row]
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, *rows)
    assert f"row {len(rows) - 1}" in str(caught.value) and "\n" not in str(caught.value)


def test_text_that_begins_like_json_stays_text(tmp_path: Path) -> None:
    texts = ['[{"a": 1}]', "[{ is a bracket", '[{"role"']
    loaded = load(tmp_path, *({"prompt": text} for text in texts))
    assert [example.prompt[0].content for example in loaded.examples] == texts
