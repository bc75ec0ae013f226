"""From an example to text: the chat template, and the check that it shows everything that the row has.

A template decides what a model sees. Some drop the tools, the system turn or the reasoning of an answer
without an error, so every part of a row is looked up in the rendered text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.data.conversation import Example, Turn, row_name
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
    hides_names: bool = False
    """Whether a turn has the name of its speaker, which the template does not write."""


def render_plain(example: Example, *, with_reference: bool, has_template: bool) -> Rendered:
    """Prompt and completion without a template. ``has_template``: the tokenizer has one that could be used.

    Raises: ConfigError for several turns, because only a template marks where a turn begins.
    """
    turns = (*example.prompt, *(example.reference if with_reference else ()))
    several = len(example.prompt) > 1 or (with_reference and len(example.reference) > 1)
    if several or example.tools or any(turn.details for turn in turns):
        must = f"be true for data of several turns or with tools ({row_name(example.row)})"
        use = "set it to true" if has_template else "use a teacher whose tokenizer has a chat template"
        remedy = f"{use}, because only a template marks where a turn begins"
        raise ConfigError("data.chat_template", "false", must, remedy)
    prompt = turns[0].content
    if not (with_reference and example.reference):
        return Rendered(row=example.row, prompt=prompt, whole=prompt)
    whole = prompt + example.reference[0].content
    return Rendered(row=example.row, prompt=prompt, whole=whole, written=((len(prompt), len(whole)),))


def render_chat(example: Example, tokenizer: PreTrainedTokenizerBase, *, with_reference: bool) -> Rendered:
    """Render a conversation with the tokenizer's chat template.

    The answers are found by rendering more turns each time: with the generation prompt before an answer and
    without it after the answer. Each rendering must begin with the one before; otherwise the learner would
    train on tokens that generation never produces. The turns between two answers are rendered together,
    because templates write the results of several tools as one turn.

    Raises: ConfigError when the template rejects the row, drops a part of it, or is not prefix-stable.
    """
    template = _Template(tokenizer, example)
    prompt = template.render(len(example.prompt), generation=True)
    _require_shown(example, example.prompt, prompt, answers=False)
    _require_context(example, template, prompt)
    if not (with_reference and example.reference):
        hides_names = _hides_names(example.prompt, prompt)
        return Rendered(row=example.row, prompt=prompt, whole=prompt, hides_names=hides_names)
    turns = (*example.prompt, *example.reference)
    done, spans, next_turn = prompt, [], len(example.prompt)
    for number, turn in enumerate(example.reference, len(example.prompt)):
        if turn.role != "assistant":
            continue
        if number > next_turn:
            opened = template.extend(done, number, generation=True)
            _require_shown(example, turns[next_turn:number], opened[len(done) :], answers=False)
            done = opened
        ended = template.extend(done, number + 1, generation=False)
        _require_shown(example, [turn], ended[len(done) :], answers=True)
        spans.append((len(done), len(ended)))
        done, next_turn = ended, number + 1
    hides_names = _hides_names(turns, done)
    return Rendered(row=example.row, prompt=prompt, whole=done, written=tuple(spans), hides_names=hides_names)


def _hides_names(turns: Sequence[Turn], text: str) -> bool:
    return any("name" in turn.details and not _is_in(str(turn.details["name"]), text) for turn in turns)


class _Template:
    """The chat template, applied to the first turns of one example."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
        self._tokenizer = tokenizer
        self._row = example.row
        self._num_prompt = len(example.prompt)
        self._messages = [turn.message() for turn in (*example.prompt, *example.reference)]
        self._tools = [dict(tool) for tool in example.tools] or None

    def render(
        self, num_turns: int, *, generation: bool, with_tools: bool = True, without: int | None = None
    ) -> str:
        """The first turns as text. ``without``: number of a turn whose content is replaced by other text."""
        from jinja2 import TemplateError

        messages = self._messages[:num_turns]
        if without is not None:
            messages[without] = {**messages[without], "content": f"not {messages[without]['content']}"}
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=self._tools if with_tools else None,  # pyright: ignore[reportArgumentType]
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            must = f"suit the tokenizer's chat template: {first_line(error)}"
            raise ConfigError(
                f"data {row_name(self._row)}", NO_VALUE, must, "correct or remove the row"
            ) from None
        return str(text)

    def extend(self, done: str, num_turns: int, *, generation: bool) -> str:
        text = self.render(num_turns, generation=generation)
        if text.startswith(done):
            return text
        later = num_turns > self._num_prompt + 1
        raise ConfigError(
            f"data {row_name(self._row)}: the tokenizer's chat template",
            NO_VALUE,
            "be prefix-stable (more turns only add text at the end), because references of this data are trained on",
            ("set data.reference_turns=first; or " if later else "")
            + "use another template; or train without references: set sft.enabled=false, and "
            "recipe.teacher_text=sampled where the recipe uses references",
        )


def _require_shown(example: Example, turns: Sequence[Turn], text: str, *, answers: bool) -> None:
    """Check that the text has the content of turns, their reasoning, and the functions and arguments of their calls.

    ``answers``: the turns are references. Of earlier answers, templates drop the reasoning on purpose.

    Raises: ConfigError.
    """
    for turn in turns:
        content = turn.content
        wanted = []
        if turn.role == "assistant" and not answers:
            content = content.rpartition("</think>")[2]
        else:
            wanted.append(turn.details.get("reasoning_content", ""))
        wanted.append(content)
        for call in turn.details.get("tool_calls", ()):
            wanted += [call["function"]["name"], *_leaves(call["function"]["arguments"])]
        for part in wanted:
            if not _is_in(part.strip(), text):
                raise _dropped(example, f"the {turn.role}'s turn", part)


def _leaves(value: object) -> list[str]:
    """The names and the texts and numbers in JSON data, as a template may write them."""
    if isinstance(value, dict):
        return [leaf for name, member in value.items() for leaf in (str(name), *_leaves(member))]
    if isinstance(value, list):
        return [leaf for member in value for leaf in _leaves(member)]
    if isinstance(value, str):
        return [value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [json.dumps(value)] if is_number else []


def _is_in(part: str, text: str) -> bool:
    """Whether a text has a part, as it is or as JSON."""
    forms = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    return any(form in text for form in forms)


def _dropped(example: Example, what: str, part: str) -> ConfigError:
    shown = part if len(part) <= 40 else f"{part[:40]}..."
    return ConfigError(
        f"data {row_name(example.row)}: {what}",
        json.dumps(shown, ensure_ascii=False),
        "be shown by the tokenizer's chat template, which drops it or a part of it",
        "use a teacher whose template shows it, or remove it from the row",
    )


def _require_context(example: Example, template: _Template, prompt: str) -> None:
    """Check that tools and turns of a system or a tool change the prompt: their words may also be elsewhere in it.

    Raises: ConfigError.
    """
    num_turns = len(example.prompt)
    for number, turn in enumerate(example.prompt):
        is_context = turn.role in ("system", "developer", "tool") and not turn.is_empty
        if is_context and template.render(num_turns, generation=True, without=number) == prompt:
            raise _dropped(example, f"the {turn.role}'s turn", turn.content)
    if not example.tools:
        return
    if template.render(num_turns, generation=True, with_tools=False) == prompt:
        raise ConfigError(
            f"data {row_name(example.row)}: its tools",
            NO_VALUE,
            "be shown by the tokenizer's chat template, which ignores tools",
            "use a teacher whose template has tools, or remove the column from the data",
        )
    for tool in example.tools:
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and not _is_in(name, prompt):
            raise _dropped(example, "its tool", name)


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
