"""The formats of data sets: which columns a conversation is read from, under the names that known sets use.

A format consists of slots, such as the prompt or the system text. Each slot has several names; the first that
a data set has is read. Every other column is reported as unused, so that nothing is dropped in silence.
docs/data.md has the formats as a table, which a test reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.data.conversation import (
    Example,
    Turn,
    as_json,
    conversation_of,
    is_turns_as_text,
    row_name,
    text_of,
    tools_of,
    turns_of,
)
from distill.errors import NO_VALUE, ConfigError

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""Slot -> the column of the data set that fills it."""
Conversation = tuple[list[Turn], list[Turn]]
"""The turns of the prompt, and those of the answer."""

_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_HISTORY = ("history",)
_EMPTY = (None, "", [], {})


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A row by slots."""

    row: Row
    columns: Columns
    where: str

    def value(self, slot: str) -> Any:
        """The value of a slot; None where the data set has no column for it."""
        return self.row.get(self.columns[slot]) if slot in self.columns else None

    def place(self, slot: str) -> str:
        """Row and column, for errors."""
        return f"{self.where} column {self.columns.get(slot, slot)}"


@dataclass(frozen=True, kw_only=True)
class Format:
    """Slots with the names of their columns, and how the turns of a row follow from them."""

    slots: Mapping[str, Sequence[str]]
    """The first slot is the one that a row must fill."""
    read: Callable[[Cells], Conversation]

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


def _read_messages(cells: Cells) -> Conversation:
    """The prompt ends where the assistant begins."""
    turns = conversation_of(cells.value("messages"), cells.place("messages"))
    first = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
    return _with_system(cells, turns[:first]), turns[first:]


def _read_prompt(cells: Cells) -> Conversation:
    prompt = turns_of(cells.value("prompt"), "user", cells.place("prompt"))
    return _context(cells, prompt), _answer(cells)


def _read_instruction(cells: Cells) -> Conversation:
    slots = [slot for slot in ("instruction", "input") if cells.value(slot)]
    parts = [text_of(cells.value(slot), cells.place(slot)) for slot in slots]
    prompt = Turn(role="user", content="\n\n".join(parts))
    return _context(cells, [prompt]), _answer(cells)


def _answer(cells: Cells) -> list[Turn]:
    return turns_of(cells.value("answer"), "assistant", cells.place("answer"))


def _context(cells: Cells, prompt: list[Turn]) -> list[Turn]:
    """The system text and the earlier turns before the prompt."""
    return _with_system(cells, [*_history(cells.value("history"), cells.place("history")), *prompt])


def _with_system(cells: Cells, turns: list[Turn]) -> list[Turn]:
    system = text_of(cells.value("system"), cells.place("system"))
    if not system:
        return turns
    if turns and turns[0].role == "system":
        must = "have one system text (it has a column and a turn)"
        raise ConfigError(cells.where, NO_VALUE, must, "remove one of the two")
    return [Turn(role="system", content=system), *turns]


def _history(value: object, where: str) -> list[Turn]:
    """Earlier turns: pairs of a user's text and the answer to it, or turns with roles; or JSON text of them."""
    value = as_json(value or [], where)
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [
            Turn(role=role, content=text_of(text, where))
            for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return conversation_of(value, where)


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
            "answer": ("completion", "response", "output", "answer"),
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
    named: Columns
    """The part of ``columns`` that settings name."""

    def example(self, index: int, row: Row, path: str) -> Example:
        """Read a row.

        Raises: ConfigError that names the row.
        """
        cells = Cells(row=row, columns=self.columns, where=f"data.path={path} {row_name(index)}")
        self._require_same_columns(cells)
        if cells.value(self.format.required) is None:
            required = self.columns[self.format.required]
            must = f"have a value in column {required} (format {self.name}); it has {_listed(row)}"
            raise ConfigError(cells.where, NO_VALUE, must, "correct the row, or set data.format")
        prompt, answer = self.format.read(cells)
        tools = tools_of(cells.value("tools"), cells.place("tools"))
        return Example.of(index, prompt, answer, tools, cells.where)

    def _require_same_columns(self, cells: Cells) -> None:
        """Raises: ConfigError for a row that has a part under another name than the other rows have it."""
        for slot, column in self.columns.items():
            if slot in self.named or cells.row.get(column) is not None:
                continue
            others = [name for name in self.format.slots[slot] if name not in self.columns.values()]
            if found := next((name for name in others if cells.row.get(name) not in _EMPTY), None):
                must = f"have its {slot} in column {column}, as other rows have, not in {found}"
                settings = {"answer": "data.answer_column", self.format.required: "data.prompt_column"}
                name_it = f", or name the column to read with {settings[slot]}" if slot in settings else ""
                raise ConfigError(cells.where, NO_VALUE, must, f"rename it in that row{name_it}")

    def unused(self, rows: Sequence[Row]) -> dict[str, int]:
        """Columns that are not read -> number of rows that have a value there."""
        used = set(self.columns.values())
        counts: dict[str, int] = {}
        for row in rows:
            for column, value in row.items():
                if column not in used and value not in _EMPTY:
                    counts[column] = counts.get(column, 0) + 1
        return counts

    def num_turns_as_text(self, rows: Sequence[Row]) -> int:
        """Number of rows in which a prompt or an answer is text that is read as turns."""
        columns = [self.columns[slot] for slot in ("prompt", "answer") if slot in self.columns]
        return sum(any(is_turns_as_text(row.get(column)) for column in columns) for row in rows)


def reading_of(
    path: str,
    rows: Sequence[Row],
    name: str,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> Reading:
    """Decide how to read a data set from the columns that any of its rows has.

    ``name``: a format, or ``auto``, which is ``prompt_completion`` where the column of the prompts is named.
    ``prompt_column``, ``answer_column``: columns for the format's first slot and for its answer.

    Raises: ConfigError when no format fits, or a column is not there.
    """
    present = list(dict.fromkeys(column for row in rows for column in row))
    for setting, column in (("data.prompt_column", prompt_column), ("data.answer_column", answer_column)):
        if column is not None and column not in present:
            must = f"be a column of {path}, which has {', '.join(present)}"
            raise ConfigError(setting, column, must, "correct the name")
    if name == "auto" and prompt_column:
        name = "prompt_completion"
    elif name == "auto":
        possible = [
            name for name, format_ in FORMATS.items() if not answer_column or "answer" in format_.slots
        ]
        name = _detected(path, rows, present, possible)
    format_ = FORMATS[name]
    named = {format_.required: prompt_column} if prompt_column else {}
    named |= {"answer": answer_column} if answer_column else {}
    columns = {**format_.columns(present), **named}
    if format_.required not in columns:
        required = " or ".join(format_.slots[format_.required])
        must = f"have a column {required} (format {name}); it has {', '.join(present)}"
        raise ConfigError("data.path", path, must, "set data.format=auto, or data.prompt_column to a column")
    return Reading(name=name, format=format_, columns=columns, named=named)


def _detected(path: str, rows: Sequence[Row], present: Sequence[str], possible: Sequence[str]) -> str:
    """The first format whose required column is there; one that holds plain text is no conversation."""
    fitting = [name for name in possible if FORMATS[name].required in FORMATS[name].columns(present)]
    if fitting[:1] == ["messages"] and len(fitting) > 1:
        column = FORMATS["messages"].columns(present)["messages"]
        if all(isinstance(row.get(column), str) and not is_turns_as_text(row[column]) for row in rows):
            fitting = fitting[1:]
    if fitting:
        return fitting[0]
    required = [FORMATS[name].slots[FORMATS[name].required] for name in possible]
    wanted = ", or ".join(" or ".join(names) for names in required)
    must = f"have a column {wanted}; it has {', '.join(present) or 'no column'}"
    remedy = "name the columns of prompt and answer with data.prompt_column and data.answer_column"
    raise ConfigError("data.path", path, must, remedy)


def _listed(row: Row) -> str:
    return ", ".join(map(str, row)) or "no column"
