"""Checks of the tokenizer's chat template, by rendering short conversations with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from deploy.run.preflight.outcome import Check
from distill.errors import ConfigError

_ANSWER = "an-answer-that-no-template-contains"
_DATES = (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 10, 19, 18, 17))


def prompt_end(tokenizer: Any, stop_token_ids: Sequence[int]) -> Check:
    """Warn of a template whose prompts end in an end-of-text token, after which a student rarely writes an answer."""
    text = _render(tokenizer, 1, generation=True)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"] if text is not None else []
    if not tokens or tokens[-1] not in {*stop_token_ids, tokenizer.eos_token_id}:
        return Check("prompt end", "pass", "prompts do not end in an end-of-text token")
    return Check(
        "prompt end", "warn", f"the chat template ends a prompt with the end-of-text token {_shown(tokenizer, tokens[-1])}, "
        "so the student writes the header of its answer itself",
        "let the template write that header where add_generation_prompt is true",
    )  # fmt: skip


def turn_end(tokenizer: Any, stop_token_ids: Sequence[int], folder: Path) -> Iterator[Check]:
    """Check that the token with which the template ends an answer stops generation.

    ``folder``: the teacher's, whose generation_config.json names the stop ids.

    Raises: ConfigError.
    """
    text = _render(tokenizer, 2, generation=False)
    if text is None or _ANSWER not in text:
        return
    tail = text.rpartition(_ANSWER)[2]
    tokens = tokenizer(tail, add_special_tokens=False)["input_ids"]
    if not tail.strip() or not {*tokens}.isdisjoint(stop_token_ids):
        yield Check("turn end", "pass", "the chat template ends an answer with a stop id, or with nothing")
        return
    stops = ", ".join(_shown(tokenizer, token) for token in stop_token_ids)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    end = next((token for token in tokens if token in special), None)
    if end is None:
        yield Check(
            "turn end", "warn", f"the chat template ends an answer with {tail!r}, which contains no stop id ({stops}), "
            "so the teacher may not stop there",
            f"end the assistant's turn in the chat template with {tokenizer.decode(stop_token_ids[:1])!r}",
        )  # fmt: skip
        return
    path, ids = folder / "generation_config.json", [*stop_token_ids, end]
    raise ConfigError(
        "stop ids", stops, f"include the token with which the chat template ends an answer, {_shown(tokenizer, end)}",
        f"set eos_token_id to {ids} in {path}" if path.exists() else f"write {json.dumps({'eos_token_id': ids})} to {path}",
    )  # fmt: skip


def date(tokenizer: Any) -> Check:
    """Warn of a template that writes today's date."""
    # A variable of this name takes precedence over the function that transformers gives to templates.
    texts = {_render(tokenizer, 1, generation=True, strftime_now=moment.strftime) for moment in _DATES}
    if len(texts) == 1:
        return Check("template date", "pass", "the chat template writes the same text every day")
    return Check(
        "template date", "warn", "the chat template writes the current date into prompts, so prompts differ from day to day, "
        "and the teacher's text for them is sampled again",
        "write a fixed date in the chat template instead of strftime_now(...)",
    )  # fmt: skip


def _render(tokenizer: Any, num_turns: int, *, generation: bool, **variables: Any) -> str | None:
    """Render alternating turns, beginning with the user's; None when the template refuses them."""
    from jinja2 import TemplateError

    turns = [("user", "question"), ("assistant", _ANSWER)]
    messages = [{"role": role, "content": content} for role, content in turns[:num_turns]]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, **variables
        )
    except TemplateError:
        return None


def _shown(tokenizer: Any, token: int) -> str:
    return f"{token} {tokenizer.decode([token])!r}"
