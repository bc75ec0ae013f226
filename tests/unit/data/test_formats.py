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
    "system text in a column (ShareGPT)": (
        [("system", "Be brief."), ("user", "Say hi.")],
        [("assistant", "Hi.")],
    ),
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
    with pytest.raises(
        ConfigError, match=r"must have a column instruction, or prompt; it has question, reply"
    ):
        load(tmp_path, row, answer_column="reply")
    loaded = load(tmp_path, {"instruction": "a", "input": "b", "reply": "c"}, answer_column="reply")
    assert turns(loaded.examples[0]) == ([("user", "a\n\nb")], [("assistant", "c")])
    chat = {"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ConfigError, match=r"set data\.format=messages and data\.prompt_column to it$"):
        load(tmp_path, chat, prompt_column="chat")
    loaded = load(tmp_path, chat, format="messages", prompt_column="chat")  # as the remedy says
    assert turns(loaded.examples[0]) == ([("user", "a")], [("assistant", "b")])


USER = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "turn 2 must have text as content, not null",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "must have parts of text only, not image_url",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "f"}]}]},
            "must have tool calls of the form",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": 3}]},
            "must have a list of tool calls, not a number",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "arguments of f must be a JSON object, not a list",
        ),
        (
            {"conversations": [{"from": "function_call", "value": '{"foo": 1}'}]},
            "must have tool calls of the form",
        ),
        ({"messages": [{"role": ["user"], "content": "Q"}]}, r"with a known role \(it has \['user'\]\)"),
        (
            {"messages": [{"role": "developer", "content": "Q"}]},
            "must have a turn that the assistant answers",
        ),
        ({"prompt": " \n", "completion": "a"}, "must have a prompt with text"),
        ({"messages": [{"role": "user", "content": []}]}, "must have a prompt with text"),
        (
            {"messages": "Hello."},
            "column messages must be a list of turns or JSON text of one, not other text",
        ),
        (
            {"messages": '[{"role": "user", "cont'},
            "must be a list of turns or JSON text of one, not other text",
        ),
        ({"messages": "[{'role': 'user', 'content': 'Q'}]"}, "not text that Python wrote"),
        ({"prompt": "[{'role': 'user', 'content': 'Q'}]"}, "not text that Python wrote"),
        ({"prompt": "a", "history": "earlier"}, "column history must be JSON"),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]},
                ]
            },
            "half of a pair",
        ),
        (
            {"messages": [USER], "tools": [{"name": "\ud83d"}]},
            "column tools must be text that can be encoded",
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
    assert f"row {len(rows)}" in str(caught.value) and "\n" not in str(caught.value)


def test_text_that_begins_like_json_stays_text(tmp_path: Path) -> None:
    texts = ['[{"a": 1}]', "[{ is a bracket", '[{"role"', '[{"from": "Rome", "to": "Paris"}]', "[]"]
    loaded = load(tmp_path, *({"prompt": text} for text in texts))
    assert [example.prompt[0].content for example in loaded.examples] == texts


def test_turns_as_text_in_a_prompt_are_read_and_counted(tmp_path: Path) -> None:
    """A CSV file cannot hold a list otherwise."""
    loaded = load(tmp_path, {"prompt": f" {json.dumps([USER])}", "completion": "A"}, {"prompt": "plain"})
    assert turns(loaded.examples[0]) == ([("user", "Q")], [("assistant", "A")])
    assert "1 with turns as JSON text" in loaded.summary()


ASSISTANT = {"role": "assistant", "content": "A"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"a\\": 1}"}]'},
    ],
)
def test_every_form_of_a_call_is_the_one_that_templates_expect(tmp_path: Path, turn: dict) -> None:
    (example,) = load(tmp_path, {"messages": [USER, turn]}).examples
    assert example.reference[0].details == {"tool_calls": [CALL]}


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "f"}],
        '[{"name": "f"}]',
        ['{"name": "f"}'],
        [{"type": "function", "function": {"name": "f"}}],
    ],
)
def test_every_form_of_a_tool_is_the_one_that_templates_expect(tmp_path: Path, tools: object) -> None:
    (example,) = load(tmp_path, {"messages": [USER], "tools": tools}).examples
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    ("tail", "used", "unused"),
    [
        ([ASSISTANT, USER], 1, 1),
        ([ASSISTANT, USER, {"role": "assistant", "content": " "}, USER, ASSISTANT], 1, 4),
        ([ASSISTANT, USER, ASSISTANT], 3, 0),
        ([{"role": "assistant", "content": ""}, USER, ASSISTANT], 0, 2),
    ],
)
def test_a_reference_ends_with_an_answer(tmp_path: Path, tail: list[dict], used: int, unused: int) -> None:
    """An empty answer would teach the student to say nothing, and turns that no answer follows teach nothing."""
    loaded = load(tmp_path, {"messages": [USER, *tail]})
    assert (len(loaded.examples[0].reference), loaded.examples[0].num_unanswered) == (used, unused)
    assert ("1 with turns at the end that are not used" in loaded.summary()) == (unused > 0)


@pytest.mark.parametrize("history", [[["b", "c"]], '[["b", "c"]]'])
def test_history_as_json_text(tmp_path: Path, history: object) -> None:
    (example,) = load(tmp_path, {"instruction": "a", "history": history}).examples
    assert turns(example)[0] == [("user", "b"), ("assistant", "c"), ("user", "a")]


def test_a_column_of_plain_text_is_no_conversation(tmp_path: Path) -> None:
    loaded = load(tmp_path, {"data": "2020", "prompt": "P", "completion": "C"})
    assert (loaded.format, loaded.unused_columns) == ("prompt_completion", {"data": 1})
    with pytest.raises(ConfigError, match=r"set data\.format=prompt_completion and data\.prompt_column"):
        load(tmp_path, {"dialogue": "A: hi", "summary": "S"})
    named = {"format": "prompt_completion", "prompt_column": "dialogue", "answer_column": "summary"}
    (example,) = load(tmp_path, {"dialogue": "A: hi", "summary": "S"}, **named).examples  # as the remedy says
    assert turns(example) == ([("user", "A: hi")], [("assistant", "S")])


def test_rows_that_differ_from_the_others_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"row 2 must have its answer in column completion, .* not in response"
    ):
        load(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"})
    loaded = load(
        tmp_path,
        {"prompt": "a", "completion": None},
        {"prompt": "a", "response": "b"},
        answer_column="response",
    )
    assert [bool(example.reference) for example in loaded.examples] == [False, True]
    with pytest.raises(
        ConfigError, match=r"row 2 must have its messages in column messages, .* not in conversations"
    ):
        load(tmp_path, {"messages": [USER]}, {"conversations": [{"from": "human", "value": "Q"}]})
