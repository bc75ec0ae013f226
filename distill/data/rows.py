"""From a data set of any known format to examples, with an account of what was read and what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.config import DataConfig
from distill.data.conversation import Example
from distill.data.formats import Reading, Row, reading_of
from distill.data.rejections import Rejections
from distill.data.sources import read_rows
from distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoadedRows:
    """The examples of a data set, and what a user should know about them."""

    examples: Sequence[Example]
    format: str
    columns: Mapping[str, str]
    """What is read -> the column that it is read from."""
    unused_columns: Mapping[str, int]
    """Columns that are not read -> number of rows that have a value there."""
    possible_columns: str
    """Every column that the format would take."""
    num_turns_as_text: int
    """Rows in which a prompt or an answer is text that is read as turns."""

    def summary(self) -> str:
        """The numbers of rows with a reference, with a system turn, and so on, in words."""
        counts = {
            "with a reference": sum(bool(example.reference) for example in self.examples),
            "with a system turn": sum(
                any(turn.role in ("system", "developer") for turn in e.prompt) for e in self.examples
            ),
            "with tools or tool turns": sum(_has_tools(example) for example in self.examples),
            "with an empty answer, which is no reference": sum(e.answer_is_empty for e in self.examples),
            "with several turns": sum(_num_questions(example) > 1 for example in self.examples),
            "with turns as JSON text": self.num_turns_as_text,
            "with turns at the end that are not used, because no answer follows": sum(
                example.num_unanswered > 0 for example in self.examples
            ),
        }
        found = [f"{count} {what}" for what, count in counts.items() if count or what == "with a reference"]
        columns = ", ".join(dict.fromkeys(self.columns.values()))
        return f"{len(self.examples)} rows of format {self.format} ({columns}): {', '.join(found)}"


def load_rows(data: DataConfig, cache: Path) -> LoadedRows:
    """Load all rows of ``data.path``.

    ``cache``: the folder that contains fetched data sets known by name.

    Raises: ConfigError with file and line, or with row and column, of the first row that breaks a rule, and the number
    of all rows that do.
    """
    rows = read_rows(data.path, data.split, cache)
    if not rows:
        raise ConfigError("data.path", data.path, "have at least one row", "choose another data set")
    reading = reading_of(data.path, rows, data.format, data.prompt_column, data.answer_column)
    return LoadedRows(
        examples=_examples(reading, rows, data.path),
        format=reading.name,
        columns=reading.columns,
        unused_columns=reading.unused(rows),
        possible_columns=reading.format.described(),
        num_turns_as_text=reading.num_turns_as_text(rows),
    )


def _examples(reading: Reading, rows: Sequence[Row], path: str) -> list[Example]:
    """Raises: ConfigError of the first row that cannot be read, with the number of all such rows."""
    examples: list[Example] = []
    refused = Rejections()
    for index, row in enumerate(rows):
        try:
            examples.append(reading.example(index, row, path))
        except ConfigError as error:
            refused.add(error)
    refused.require_none(len(rows))
    return examples


def _has_tools(example: Example) -> bool:
    turns = (*example.prompt, *example.reference)
    return bool(example.tools) or any(turn.role == "tool" or "tool_calls" in turn.details for turn in turns)


def _num_questions(example: Example) -> int:
    return sum(turn.role == "user" for turn in (*example.prompt, *example.reference))
