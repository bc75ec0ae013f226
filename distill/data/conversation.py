"""Conversations, independent of the format that they come in, and how their turns are read.

Every turn that a row has ends up in an :class:`Example`, or the row is refused with its number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.data.files import json_kind
from distill.errors import NO_VALUE, ConfigError

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Role as data sets write it -> role as chat templates know it."""
_CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT turns whose text is a call as JSON."""
_FOR_TEMPLATE = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys of a turn that templates read, beside role and content."""
_WITHOUT_TEXT = ("id", "weight")
"""Keys of a turn that say nothing that a model reads."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation."""

    role: str
    content: str
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template gets: tool calls, the id that a tool answers, a name."""

    def message(self) -> dict[str, Any]:
        """The turn as chat templates expect it."""
        return {"role": self.role, "content": self.content, **self.details}

    @property
    def is_empty(self) -> bool:
        return not self.content.strip() and "tool_calls" not in self.details


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a data set, independent of its format."""

    row: int
    """Row of the data set, from 0."""
    prompt: tuple[Turn, ...]
    """The turns that the model answers. At least one."""
    reference: tuple[Turn, ...] = ()
    """The answer: a turn of the assistant, and any turns after it. Empty: no reference."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the functions that the assistant may call."""
    answer_is_empty: bool = False
    """Whether the row has an answer without text, which is no reference."""

    @classmethod
    def of(
        cls,
        row: int,
        prompt: Sequence[Turn],
        answer: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]],
        where: str,
    ) -> Example:
        """Check the turns of a row.

        Raises: ConfigError when nothing asks, or when the answer begins with another's turn.
        """
        if all(turn.role == "system" for turn in prompt) or prompt[-1].role == "assistant":
            must = "have a turn that the assistant answers"
            raise ConfigError(where, NO_VALUE, must, "correct or remove the row")
        if answer and answer[0].role != "assistant":
            must = f"have an answer that begins with the assistant's turn, not the {answer[0].role}'s"
            raise ConfigError(where, NO_VALUE, must, "correct or remove the row")
        is_empty = bool(answer) and answer[0].is_empty
        return cls(
            row=row,
            prompt=tuple(prompt),
            reference=() if is_empty else tuple(answer),
            tools=tuple(tools),
            answer_is_empty=is_empty,
        )


def text_of(value: object, where: str) -> str:
    """Text, checked to be text that can be encoded. Null is empty; parts of text are joined.

    Raises: ConfigError.
    """
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "".join(_text_of_part(part, where) for part in value)
    if not isinstance(value, str):
        must = f"have text as content, not {json_kind(value)}"
        raise ConfigError(where, NO_VALUE, must, "correct the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        must = f"be text that can be encoded, but character {error.start} is half of a pair (\\u{ord(value[error.start]):x})"
        raise ConfigError(where, NO_VALUE, must, "correct or remove the row") from None
    return value


def _text_of_part(part: Mapping[str, Any], where: str) -> str:
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        must = f"have parts of text only, not {part.get('type', 'one without text')}"
        raise ConfigError(where, NO_VALUE, must, "remove the row, because only text is distilled")
    return text_of(part["text"], where)


def turns_of(value: object, role: str, where: str) -> list[Turn]:
    """The turns of a column: text is one turn of ``role``, a list has turns with roles, null is empty.

    A list of texts alternates between the user and the assistant. Text that holds a JSON list of turns is
    read as that list.

    Raises: ConfigError.
    """
    if value is None:
        return []
    if isinstance(value, str):
        parsed = _turns_as_json(value, where)
        if parsed is None:
            return [Turn(role=role, content=text_of(value, where))]
        value = parsed
    if not isinstance(value, list):
        must = f"be text or a list of turns, not {json_kind(value)}"
        raise ConfigError(where, NO_VALUE, must, "correct the row")
    if value and all(isinstance(turn, str) for turn in value):
        return [
            Turn(role=("user", "assistant")[number % 2], content=text_of(turn, f"{where} turn {number}"))
            for number, turn in enumerate(value)
        ]
    return [_turn(turn, f"{where} turn {number}") for number, turn in enumerate(value)]


def _turns_as_json(text: str, where: str) -> list[Any] | None:
    """The list of turns that a text holds as JSON; None for text that is just text."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    is_turns = isinstance(value, list) and all(
        isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in value
    )
    return value if is_turns else None


def _turn(turn: object, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise ConfigError(where, NO_VALUE, "have role and content", "correct the row")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    written = turn.get(role_key)
    if written not in _ROLES:
        known = ", ".join(_ROLES)
        must = f"have role and content, or from and value, with a known role (it has {written})"
        raise ConfigError(where, NO_VALUE, must, f"use one of {known}")
    details = {name: turn[name] for name in _FOR_TEMPLATE if turn.get(name)}
    lost = [
        name
        for name, value in turn.items()
        if name not in (role_key, text_key, *_FOR_TEMPLATE, *_WITHOUT_TEXT, "function_call") and value
    ]
    if lost:
        must = f"have no parts beside its text that would be lost (it has {', '.join(lost)})"
        raise ConfigError(where, NO_VALUE, must, "remove them, or write them into the text")
    if written in _CALLS:
        call = _parsed(turn.get(text_key), dict, f"{where} (a {written})")
        return Turn(
            role="assistant", content="", details={"tool_calls": [{"type": "function", "function": call}]}
        )
    if call := turn.get("function_call"):  # OpenAI's form before tool_calls
        details["tool_calls"] = [{"type": "function", "function": call}]
    if turn.get("weight") == 0:
        must = "count in the loss (its weight is 0)"
        raise ConfigError(
            where, NO_VALUE, must, "remove the row, or the weight if the turn may be trained on"
        )
    if "tool_calls" in details:
        details["tool_calls"] = [_call(call, where) for call in details["tool_calls"]]
    elif turn.get(text_key) is None:
        must = f"have text as content, not {json_kind(turn.get(text_key))}"
        raise ConfigError(where, NO_VALUE, must, "correct the row")
    return Turn(role=_ROLES[written], content=text_of(turn.get(text_key), where), details=details)


def _call(call: object, where: str) -> dict[str, Any]:
    """A tool call, with its arguments as an object: templates write the JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or "name" not in function:
        must = "have tool calls of the form {function: {name, arguments}}"
        raise ConfigError(where, NO_VALUE, must, "correct the row")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", dict, f"{where} arguments of {function['name']}")
    return {**call, "function": {**function, "arguments": arguments or {}}}


def tools_of(value: object, where: str) -> list[Mapping[str, Any]]:
    """The descriptions of a ``tools`` column: a list, or JSON text of one. Null and empty are none.

    Raises: ConfigError.
    """
    if value in (None, "", []):
        return []
    if isinstance(value, str):
        value = _parsed(value, list, where)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ConfigError(where, NO_VALUE, "be a list of function descriptions", "correct the row")
    return value


def _parsed(text: object, kind: type, where: str) -> Any:
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise ConfigError(where, NO_VALUE, f"be JSON ({error.msg})", "correct the row") from None
    if not isinstance(value, kind):
        must = f"be a JSON {'object' if kind is dict else 'list'}, not {json_kind(value)}"
        raise ConfigError(where, NO_VALUE, must, "correct the row")
    return value
