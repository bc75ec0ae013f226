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


def prompt_end(tokenizer: Any, stop_token_ids: Sequence[int], *, chat: bool) -> Check:
    """Check that a prompt does not end in an end-of-text token, after which the student would write nothing useful.

    ``chat``: prompts are rendered with the chat template.

    Raises: ConfigError when the tokenizer appends the token to plain text.
    """
    text = _render(tokenizer, 1, generation=True) if chat else "text"
    tokens = tokenizer(text, add_special_tokens=not chat)["input_ids"] if text is not None else []
    ends = {*stop_token_ids, tokenizer.eos_token_id}
    if not tokens or tokens[-1] not in ends:
        return Check("prompt end", "pass", "prompts do not end in an end-of-text token")
    shown = _shown(tokenizer, tokens[-1])
    if chat:
        return Check(
            "prompt end", "warn", f"the chat template ends a prompt with the end-of-text token {shown}, "
            "so the student writes the header of its answer itself",
            "let the template write that header where add_generation_prompt is true",
        )  # fmt: skip
    begins = tokens[0] == tokenizer.bos_token_id
    chat_remedy = "set data.chat_template=true, or " if tokenizer.chat_template else ""
    raise ConfigError(
        "tokenizer", tokenizer.name_or_path, f"not append an end-of-text token to prompts ({shown})",
        f"{chat_remedy}load it with AutoTokenizer.from_pretrained, set its add_bos_token to {begins} and its add_eos_token to "
        "False, and write it to the teacher's folder with save_pretrained",
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


def keeps_earlier_turns(tokenizer: Any, *, reasoning: bool) -> bool:
    """Whether a conversation of several turns begins with the text of its first turns.

    ``reasoning``: answers contain reasoning between <think> and </think>, which some templates remove from
    earlier turns.
    """
    before = ""
    for turns in (1, 2, 3, 4):
        text = _render(tokenizer, turns, generation=turns % 2 == 1, reasoning=reasoning)
        if text is None or not text.startswith(before):
            return False
        before = text
    return True


def _render(
    tokenizer: Any, num_turns: int, *, generation: bool, reasoning: bool = False, **variables: Any
) -> str | None:
    """Render alternating turns, beginning with the user's; None when the template refuses them."""
    from jinja2 import TemplateError

    answer = f"<think>\nwhy\n</think>\n\n{_ANSWER}" if reasoning else _ANSWER
    turns = [("user", "question"), ("assistant", answer)] * 2
    messages = [{"role": role, "content": content} for role, content in turns[:num_turns]]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, **variables
        )
    except TemplateError:
        return None


def _shown(tokenizer: Any, token: int) -> str:
    return f"{token} {tokenizer.decode([token])!r}"
