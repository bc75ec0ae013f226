"""Conversations, independent of the format that they come in, and how their turns are read.

Every turn that a row has ends up in an :class:`Example`, or the row is refused with its number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.data.files import json_kind, json_problem
from distill.errors import NO_VALUE, ConfigError, first_line

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
_PYTHON_TURNS = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")
"""How text begins that Python, and not JSON, wrote from a list of turns."""


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


def row_name(row: int) -> str:
    """The name that messages give to a row, from 0, of a data set: it counts from 1, as editors do."""
    return f"row {row + 1}"


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
    num_unanswered: int = 0
    """Turns at the end that are not used, because no answer follows them, or an empty one."""

    @classmethod
    def of(
        cls,
        row: int,
        prompt: Sequence[Turn],
        answer: Sequence[Turn],
        tools: Sequence[Mapping[str, Any]],
        where: str,
    ) -> Example:
        """Check the turns of a row. The reference ends with the last answer before an empty one.

        Raises: ConfigError when nothing asks, or when the answer begins with another's turn.
        """
        if all(turn.role in ("system", "developer") for turn in prompt) or prompt[-1].role == "assistant":
            must = "have a turn that the assistant answers"
            remedy = (
                "correct or remove the row; if the column has whole conversations, set data.format=messages "
                "and data.prompt_column to it"
            )
            raise ConfigError(where, NO_VALUE, must, remedy)
        if prompt[-1].role == "user" and prompt[-1].is_empty:
            raise ConfigError(where, NO_VALUE, "have a prompt with text", "correct or remove the row")
        if answer and answer[0].role != "assistant":
            must = f"have an answer that begins with the assistant's turn, not the {answer[0].role}'s"
            raise ConfigError(where, NO_VALUE, must, "correct or remove the row")
        is_empty = bool(answer) and answer[0].is_empty
        reference = _answered(answer)
        return cls(
            row=row,
            prompt=tuple(prompt),
            reference=reference,
            tools=tuple(tools),
            answer_is_empty=is_empty,
            num_unanswered=len(answer) - len(reference) - is_empty,
        )


def _answered(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns up to the last answer before an empty one."""
    answers = [turn.role == "assistant" for turn in turns]
    empty = next((i for i, turn in enumerate(turns) if answers[i] and turn.is_empty), len(turns))
    return tuple(turns[: max((i + 1 for i in range(empty) if answers[i]), default=0)])


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
    require_encodable(value, where)
    return value


def require_encodable(text: str, where: str) -> None:
    """Raises: ConfigError for text with half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):x}"
        must = f"be text that can be encoded, but character {error.start} is half of a pair ({half})"
        raise ConfigError(where, NO_VALUE, must, "correct or remove the row") from None


def _text_of_part(part: Mapping[str, Any], where: str) -> str:
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        must = f"have parts of text only, not {part.get('type', 'one without text')}"
        raise ConfigError(where, NO_VALUE, must, "remove the row, because only text is distilled")
    return text_of(part["text"], where)


def conversation_of(value: object, where: str) -> list[Turn]:
    """The turns of a column that holds conversations: a list of turns, or JSON text of one.

    A list of texts alternates between the user and the assistant.

    Raises: ConfigError.
    """
    if isinstance(value, str):
        value = _parsed_turns(value, where)
    if not isinstance(value, list):
        must = f"be text or a list of turns, not {json_kind(value)}"
        raise ConfigError(where, NO_VALUE, must, "correct the row")
    if value and all(isinstance(turn, str) for turn in value):
        return [
            Turn(role=("user", "assistant")[number % 2], content=text_of(turn, f"{where} turn {number + 1}"))
            for number, turn in enumerate(value)
        ]
    return [_turn(turn, f"{where} turn {number}") for number, turn in enumerate(value, 1)]


def turns_of(value: object, role: str, where: str) -> list[Turn]:
    """The turns of a column that holds text or turns: text is one turn of ``role``, null is empty.

    Text that is a JSON list of turns is read as that list.

    Raises: ConfigError.
    """
    if value is None:
        return []
    if isinstance(value, str) and not is_turns_as_text(value):
        _refuse_python(value, where)
        return [Turn(role=role, content=text_of(value, where))]
    return conversation_of(value, where)


def is_turns_as_text(value: object) -> bool:
    """Whether a value is text that holds a JSON list of turns with known roles."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return False
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return bool(turns) and all(
        isinstance(turn, dict)
        and _role(turn.get("role", turn.get("from"))) is not None
        and not {"content", "tool_calls", "value"}.isdisjoint(turn)
        for turn in turns
    )


def _parsed_turns(text: str, where: str) -> list[Any]:
    _refuse_python(text, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ConfigError(
            where,
            NO_VALUE,
            "be a list of turns or JSON text of one, not other text",
            "correct it; or, if each of its texts is a prompt, set data.format=prompt_completion and "
            "data.prompt_column to this column",
        )
    return value


def _refuse_python(text: str, where: str) -> None:
    if _PYTHON_TURNS.match(text):
        must = "be a list of turns or JSON text of one, not text that Python wrote (with single quotes)"
        raise ConfigError(
            where, NO_VALUE, must, "write the column with json.dumps, or the file as JSON Lines"
        )


def _role(written: object) -> str | None:
    """The role as templates know it; None for one that is not known."""
    return _ROLES.get(written.lower()) if isinstance(written, str) else None


def _turn(turn: object, where: str) -> Turn:
    if not isinstance(turn, dict):
        raise ConfigError(where, NO_VALUE, "have role and content", "correct the row")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    written, text = turn.get(role_key), turn.get(text_key)
    role = _role(written)
    if role is None:
        must = f"have role and content, or from and value, with a known role (it has {written})"
        raise ConfigError(where, NO_VALUE, must, f"use one of {', '.join(_ROLES)}")
    _refuse_losses(turn, (role_key, text_key), where)
    details = {name: turn[name] for name in _FOR_TEMPLATE if turn.get(name)}
    if str(written).lower() in _CALLS:
        found = as_json(text, f"{where} (a {written})")
        details["tool_calls"], text = found if isinstance(found, list) else [found], ""
    elif call := turn.get("function_call"):  # OpenAI's form before tool_calls
        details["tool_calls"] = [call]
    if "tool_calls" in details:
        details["tool_calls"] = _calls(details["tool_calls"], where)
    elif text is None:
        raise ConfigError(where, NO_VALUE, "have text as content, not null", "correct the row")
    _require_all_encodable(details, where)
    return Turn(role=role, content=text_of(text, where), details=details)


def _refuse_losses(turn: Mapping[str, Any], read: Sequence[str], where: str) -> None:
    """Raises: ConfigError for parts of a turn that would not reach the model, or would but should not."""
    known = (*read, *_FOR_TEMPLATE, *_WITHOUT_TEXT, "function_call")
    lost = [name for name, value in turn.items() if name not in known and value]
    if lost:
        must = f"have no parts beside its text that would be lost (it has {', '.join(lost)})"
        raise ConfigError(where, NO_VALUE, must, "remove them, or write them into the text")
    if turn.get("weight") == 0:
        remedy = "remove the row, or the weight if the turn may be trained on"
        raise ConfigError(where, NO_VALUE, "count in the loss (its weight is 0)", remedy)


def _calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Tool calls in the form that templates expect: ``{type, function: {name, arguments}}``.

    Arguments become an object, because templates write the JSON themselves.
    """
    calls = as_json(calls, f"{where} tool_calls")
    if not isinstance(calls, list):
        raise ConfigError(
            where, NO_VALUE, f"have a list of tool calls, not {json_kind(calls)}", "correct the row"
        )
    return [_call(call, where) for call in calls]


def _call(call: object, where: str) -> dict[str, Any]:
    if isinstance(call, dict) and "function" not in call and "name" in call:
        call = {"function": call}
    function = call.get("function") if isinstance(call, dict) else None
    if (
        not isinstance(call, dict)
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
    ):
        must = "have tool calls of the form {function: {name, arguments}}"
        raise ConfigError(where, NO_VALUE, must, "correct the row")
    place = f"{where} arguments of {function['name']}"
    arguments = as_json(function.get("arguments") or {}, place)
    if not isinstance(arguments, dict):
        raise ConfigError(place, NO_VALUE, f"be a JSON object, not {json_kind(arguments)}", "correct the row")
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def tools_of(value: object, where: str) -> list[Mapping[str, Any]]:
    """The descriptions of a ``tools`` column: a list, or JSON text of one. Null and empty are none.

    A bare description gets the form that templates expect: ``{type, function: {name, parameters}}``.

    Raises: ConfigError.
    """
    tools = as_json(value or [], where)
    if not isinstance(tools, list):
        raise ConfigError(where, NO_VALUE, f"be a JSON list, not {json_kind(tools)}", "correct the row")
    tools = [as_json(tool, where) for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ConfigError(where, NO_VALUE, "be a list of function descriptions", "correct the row")
    _require_all_encodable(tools, where)
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
        for tool in tools
    ]


def as_json(value: object, where: str) -> Any:
    """The value of JSON text; other values stay."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        reason = json_problem(error) if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise ConfigError(where, NO_VALUE, f"be JSON ({reason})", "correct the row") from None


def _require_all_encodable(value: object, where: str) -> None:
    require_encodable(json.dumps(value, ensure_ascii=False, default=str), where)
