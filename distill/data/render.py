"""From an example to text: the chat template, and the check that it shows everything that the row has.

A template decides what a model sees. Some drop the tools, the system turn or the reasoning of an answer
without an error, so every part of a row is looked up in the rendered text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.data.conversation import Example, Turn
from distill.errors import NO_VALUE, ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One example as text."""

    row: int
    prompt: str
    """The text up to the place where the assistant begins to write."""
    whole: str
    """Prompt and reference; equal to ``prompt`` where there is no reference."""
    written: tuple[tuple[int, int], ...] = ()
    """Characters of ``whole`` that the assistant writes, as [start, end), one span per turn."""


def render_plain(example: Example, *, with_reference: bool) -> Rendered:
    """Prompt and completion without a template.

    Raises: ConfigError for several turns, because only a template marks where a turn begins.
    """
    turns = (*example.prompt, *(example.reference if with_reference else ()))
    several = len(example.prompt) > 1 or (with_reference and len(example.reference) > 1)
    if several or example.tools or any(turn.details for turn in turns):
        must = f"be true for data of several turns or with tools (row {example.row})"
        remedy = "set it to true, because only a template marks where a turn begins"
        raise ConfigError("data.chat_template", "false", must, remedy)
    prompt = turns[0].content
    if not (with_reference and example.reference):
        return Rendered(row=example.row, prompt=prompt, whole=prompt)
    whole = prompt + example.reference[0].content
    return Rendered(row=example.row, prompt=prompt, whole=whole, written=((len(prompt), len(whole)),))


def render_chat(example: Example, tokenizer: PreTrainedTokenizerBase, *, with_reference: bool) -> Rendered:
    """Render a conversation with the tokenizer's chat template.

    The turns of the reference are found by rendering one turn more each time: with the generation prompt
    before an assistant's turn and without it after the turn. Each rendering must begin with the one before;
    otherwise the learner would train on tokens that generation never produces.

    Raises: ConfigError when the template rejects the row, drops a part of it, or is not prefix-stable.
    """
    template = _Template(tokenizer, example)
    prompt = template.render(len(example.prompt), generation=True)
    _require_shown(example, example.prompt, prompt)
    _require_tools(example, template, prompt)
    if not (with_reference and example.reference):
        return Rendered(row=example.row, prompt=prompt, whole=prompt)
    done = prompt
    spans: list[tuple[int, int]] = []
    turns = (*example.prompt, *example.reference)
    follows_assistant = False
    for number, turn in enumerate(example.reference, len(example.prompt) + 1):
        by_assistant = turn.role == "assistant"
        if by_assistant and done != prompt and not follows_assistant:
            done = template.extend(done, number - 1, generation=True)
        ended = template.extend(done, number, generation=False)
        if by_assistant:
            spans.append((len(done), len(ended)))
        _require_shown(example, turns[number - 1 : number], ended[len(done) :], reference=True)
        done, follows_assistant = ended, by_assistant
    return Rendered(row=example.row, prompt=prompt, whole=done, written=tuple(spans))


class _Template:
    """The chat template, applied to the first turns of one example."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
        self._tokenizer = tokenizer
        self._row = example.row
        self._messages = [turn.message() for turn in (*example.prompt, *example.reference)]
        self._tools = [dict(tool) for tool in example.tools] or None

    def render(self, num_turns: int, *, generation: bool, with_tools: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                self._messages[:num_turns],
                tools=self._tools if with_tools else None,  # pyright: ignore[reportArgumentType]
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            must = f"suit the tokenizer's chat template: {first_line(error)}"
            raise ConfigError(f"data row {self._row}", NO_VALUE, must, "correct or remove the row") from None
        return str(text)

    def extend(self, done: str, num_turns: int, *, generation: bool) -> str:
        text = self.render(num_turns, generation=generation)
        if text.startswith(done):
            return text
        raise ConfigError(
            f"data row {self._row}: the tokenizer's chat template",
            NO_VALUE,
            "be prefix-stable (more turns only add text at the end), because references of this data are trained on",
            "use another template; or train without references: set sft.enabled=false, and recipe.teacher_text=sampled "
            "where the recipe uses references",
        )


def _require_shown(example: Example, turns: Sequence[Turn], text: str, *, reference: bool = False) -> None:
    """Raises: ConfigError when the text lacks the content of a turn, or the name of a function it calls.

    Earlier answers of the assistant are left out of the check: templates drop their reasoning on purpose.
    """
    for turn in turns:
        if turn.role == "assistant" and not reference:
            continue
        wanted = [
            turn.content.strip(),
            *(call["function"]["name"] for call in turn.details.get("tool_calls", ())),
        ]
        for part in wanted:
            if (
                part not in text
                and json.dumps(part)[1:-1] not in text
                and json.dumps(part, ensure_ascii=False)[1:-1] not in text
            ):
                shown = part if len(part) <= 40 else f"{part[:40]}..."
                raise ConfigError(
                    f"data row {example.row}: the {turn.role}'s turn",
                    json.dumps(shown, ensure_ascii=False),
                    "be shown by the tokenizer's chat template, which drops it or a part of it",
                    "use a teacher whose template shows it, or remove it from the row",
                )


def _require_tools(example: Example, template: _Template, prompt: str) -> None:
    if not example.tools:
        return
    if template.render(len(example.prompt), generation=True, with_tools=False) == prompt:
        raise ConfigError(
            f"data row {example.row}: its tools",
            NO_VALUE,
            "be shown by the tokenizer's chat template, which ignores tools",
            "use a teacher whose template has tools, or remove the column from the data",
        )


def as_text(turns: Sequence[Turn]) -> str:
    """Turns as a person reads them: one alone is its text, several are ``role: text``."""
    if len(turns) == 1 and not turns[0].details:
        return turns[0].content
    return "\n".join(f"{turn.role}: {_readable(turn)}" for turn in turns)


def _readable(turn: Turn) -> str:
    calls: Sequence[dict[str, Any]] = turn.details.get("tool_calls", ())
    called = [
        f"{call['function']['name']}({json.dumps(call['function']['arguments'], ensure_ascii=False)})"
        for call in calls
    ]
    return " ".join(part for part in (turn.content, *called) if part)
