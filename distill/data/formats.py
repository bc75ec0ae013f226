"""The formats of data sets: which columns a conversation is read from, under the names that known sets use.

A format consists of slots, such as the prompt or the system text. Each slot has several names; the first that
a data set has is read. Every other column is reported as unused, so that nothing is dropped in silence.
docs/data.md has the formats as a table, which a test reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.data.conversation import Example, Turn, text_of, tools_of, turns_of
from distill.errors import NO_VALUE, ConfigError

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""Slot -> the column of the data set that fills it."""
Values = Mapping[str, Any]
"""Slot -> the value that a row has there."""
Conversation = tuple[list[Turn], list[Turn]]
"""The turns of the prompt, and those of the answer."""

_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_HISTORY = ("history",)
_ANSWERS = ("completion", "response", "output", "answer")


@dataclass(frozen=True, kw_only=True)
class Format:
    """Slots with the names of their columns, and how the turns of a row follow from them."""

    slots: Mapping[str, Sequence[str]]
    """The first slot is the one that a row must fill."""
    read: Callable[[Values, str], Conversation]
    """From a row's values, and the place to name in errors."""

    @property
    def required(self) -> str:
        return next(iter(self.slots))

    def columns(self, present: Iterable[str]) -> Columns:
        """The columns of a data set that fill the slots."""
        names = set(present)
        found = {slot: next((name for name in of if name in names), None) for slot, of in self.slots.items()}
        return {slot: name for slot, name in found.items() if name is not None}

    def described(self) -> str:
        """The columns that it takes, for messages."""
        return ", ".join(" or ".join(names) for names in self.slots.values())


def _read_messages(values: Values, where: str) -> Conversation:
    """The prompt ends where the assistant begins."""
    turns = turns_of(values["messages"], "user", where)
    first = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
    return _with_system(values, turns[:first], where), turns[first:]


def _read_prompt(values: Values, where: str) -> Conversation:
    prompt = turns_of(values["prompt"], "user", f"{where} column prompt")
    return _context(values, prompt, where), _answer(values, where)


def _read_instruction(values: Values, where: str) -> Conversation:
    slots = [slot for slot in ("instruction", "input") if values.get(slot)]
    parts = [text_of(values[slot], f"{where} column {slot}") for slot in slots]
    prompt = Turn(role="user", content="\n\n".join(parts))
    return _context(values, [prompt], where), _answer(values, where)


def _answer(values: Values, where: str) -> list[Turn]:
    return turns_of(values.get("answer"), "assistant", f"{where} column of the answer")


def _context(values: Values, prompt: list[Turn], where: str) -> list[Turn]:
    """The system text and the earlier turns before the prompt."""
    return _with_system(values, [*_history(values.get("history"), where), *prompt], where)


def _with_system(values: Values, turns: list[Turn], where: str) -> list[Turn]:
    system = text_of(values.get("system"), f"{where} column system")
    if not system:
        return turns
    if turns and turns[0].role == "system":
        must = "have one system text (it has a column and a turn)"
        raise ConfigError(where, NO_VALUE, must, "remove one of the two")
    return [Turn(role="system", content=system), *turns]


def _history(value: object, where: str) -> list[Turn]:
    """Earlier turns: pairs of a user's text and the answer to it, or turns with roles."""
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [
            Turn(role=role, content=text_of(text, f"{where} column history"))
            for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns_of(value, "user", f"{where} column history")


FORMATS: Mapping[str, Format] = {
    "messages": Format(
        slots={
            "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "data"),
            "system": _SYSTEM,
            "tools": _TOOLS,
        },
        read=_read_messages,
    ),
    "instruction": Format(
        slots={
            "instruction": ("instruction",),
            "input": ("input", "context"),
            "answer": ("output", "response", "completion", "answer"),
            "system": _SYSTEM,
            "history": _HISTORY,
            "tools": _TOOLS,
        },
        read=_read_instruction,
    ),
    "prompt_completion": Format(
        slots={
            "prompt": ("prompt",),
            "answer": _ANSWERS,
            "system": _SYSTEM,
            "history": _HISTORY,
            "tools": _TOOLS,
        },
        read=_read_prompt,
    ),
}
"""By name, in the order in which ``auto`` tries them."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the rows of one data set are read."""

    name: str
    format: Format
    columns: Columns

    def example(self, index: int, row: Row, path: str) -> Example:
        """Read a row.

        Raises: ConfigError that names the row.
        """
        where = f"data.path={path} row {index}"
        required = self.columns[self.format.required]
        if row.get(required) is None:
            must = f"have a value in column {required} (format {self.name}); it has {_listed(row)}"
            raise ConfigError(where, NO_VALUE, must, "correct the row, or set data.format")
        values = {slot: row.get(column) for slot, column in self.columns.items()}
        prompt, answer = self.format.read(values, where)
        tools = tools_of(values.get("tools"), f"{where} column tools")
        return Example.of(index, prompt, answer, tools, where)

    def unused(self, rows: Sequence[Row]) -> dict[str, int]:
        """Columns that are not read -> number of rows that have a value there."""
        used = set(self.columns.values())
        counts: dict[str, int] = {}
        for row in rows:
            for column, value in row.items():
                if column not in used and value not in (None, "", [], {}):
                    counts[column] = counts.get(column, 0) + 1
        return counts


def reading_of(
    path: str,
    rows: Sequence[Row],
    name: str,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> Reading:
    """Decide how to read a data set from the columns that any of its rows has.

    ``name``: a format, or ``auto``. ``prompt_column``, ``answer_column``: columns that stand for ``prompt`` and
    ``completion``.

    Raises: ConfigError when no format fits, or a column is not there.
    """
    present = list(dict.fromkeys(column for row in rows for column in row))
    for setting, column in (("data.prompt_column", prompt_column), ("data.answer_column", answer_column)):
        if column is not None and column not in present:
            must = f"be a column of {path}, which has {', '.join(present)}"
            raise ConfigError(setting, column, must, "correct the name")
    if prompt_column or answer_column:
        name = "prompt_completion"
        if prompt_column is None and "prompt" not in present:
            must = "be set together with data.answer_column, because there is no column prompt"
            raise ConfigError("data.prompt_column", "null", must, "name the column of the prompts")
    elif name == "auto":
        name = _detected(path, present)
    elif FORMATS[name].required not in FORMATS[name].columns(present):
        required = " or ".join(FORMATS[name].slots[FORMATS[name].required])
        must = f"have a column {required} (format {name}); it has {', '.join(present)}"
        raise ConfigError("data.path", path, must, "set data.format=auto, or data.prompt_column to a column")
    columns = dict(FORMATS[name].columns(present))
    columns |= {"prompt": prompt_column} if prompt_column else {}
    columns |= {"answer": answer_column} if answer_column else {}
    return Reading(name=name, format=FORMATS[name], columns=columns)


def _detected(path: str, present: Sequence[str]) -> str:
    for name, format_ in FORMATS.items():
        if format_.required in format_.columns(present):
            return name
    wanted = ", or ".join(" or ".join(format_.slots[format_.required]) for format_ in FORMATS.values())
    must = f"have a column {wanted}; it has {', '.join(present) or 'no column'}"
    remedy = "name the columns of prompt and answer with data.prompt_column and data.answer_column"
    raise ConfigError("data.path", path, must, remedy)


def _listed(row: Row) -> str:
    return ", ".join(map(str, row)) or "no column"
