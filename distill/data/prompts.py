"""The prompt table: the only place where text becomes tokens.

Generator, teacher and learner all use its token ids. It has one row per prompt: the training rows
come first and the held-out rows after them, both in the order of the data set.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from distill.config import DataConfig
from distill.data.rows import Example, Turn
from distill.errors import NO_VALUE, ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_SCHEMA = pa.schema(
    [
        # Token ids of the prompt, chat template applied. Never null, never empty.
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        # Token ids of the reference, stop token included unless the length limit cut it.
        # Null: the data set has none for this prompt.
        pa.field("reference_tokens", pa.list_(pa.int32())),
        # Per reference token: whether the loss counts it. Null: all count (false only for text that
        # the assistant did not write inside a reference of several turns).
        pa.field("reference_mask", pa.list_(pa.bool_())),
        # The prompt as its author wrote it, without template; several turns as "role: text".
        pa.field("prompt_text", pa.string(), nullable=False),
        # The reference in the same form, never cut. Null where reference_tokens is null.
        pa.field("reference_text", pa.string()),
        # Kept out of training, for evaluation.
        pa.field("heldout", pa.bool_(), nullable=False),
        # Row of the data set, from 0.
        pa.field("data_row", pa.int64(), nullable=False),
    ]
)

_SKIPPED_KEY = b"distill.num_skipped_prompts"


def build_prompts(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    stop_token_ids: Sequence[int],
    seed: int = 0,
) -> pa.Table:
    """Build the prompt table (columns: ``PROMPT_SCHEMA``).

    ``stop_token_ids``: those of the teacher; the first one ends a reference that the template does
    not end. ``seed`` determines which rows are held out.

    Raises: ConfigError for an empty prompt or one over the limit, for a template that is missing or
    unsuitable, and when no row would be left to train on.
    """
    if data.chat_template and not tokenizer.chat_template:
        raise ConfigError(
            "data.chat_template", "true", "be false for a tokenizer without chat template", "set it to false"
        )
    render = _render_chat if data.chat_template else _render_plain
    rendered = [render(example, tokenizer) for example in rows]
    # A template writes its own special tokens. Plain text gets those that the tokenizer adds to a text.
    prompts = _tokenize(
        tokenizer, [prompt for prompt, _ in rendered], add_special_tokens=not data.chat_template
    )
    pieces = iter(_tokenize(tokenizer, [piece.text for _, pieces in rendered for piece in pieces]))
    columns: dict[str, list[Any]] = {name: [] for name in PROMPT_SCHEMA.names if name != "heldout"}
    for example, prompt_tokens, (_, reference) in zip(rows, prompts, rendered, strict=True):
        reference_pieces = list(itertools.islice(pieces, len(reference)))
        if not _prompt_fits(example.row, len(prompt_tokens), data):
            continue
        tokens, mask = _join_reference(reference, reference_pieces, stop_token_ids, data.max_reference_tokens)
        columns["prompt_tokens"].append(prompt_tokens)
        columns["reference_tokens"].append(tokens)
        columns["reference_mask"].append(mask)
        columns["prompt_text"].append(_as_text(example.prompt))
        columns["reference_text"].append(_as_text(example.reference) if example.reference else None)
        columns["data_row"].append(example.row)
    num_rows = len(columns["data_row"])
    columns["heldout"] = _choose_heldout(num_rows, data.num_heldout, seed).tolist()
    metadata = {_SKIPPED_KEY: str(len(rows) - num_rows).encode()}
    table = pa.table(columns, schema=PROMPT_SCHEMA.with_metadata(metadata))
    return table.take(np.argsort(columns["heldout"], kind="stable"))


def training_rows(table: pa.Table) -> pa.Table:
    """Return the rows of a prompt table that are not held out; each row keeps its number."""
    return table.filter(pa.array(~table["heldout"].to_numpy()))


def heldout_rows(table: pa.Table) -> pa.Table:
    """Return the held-out rows of a prompt table as a separate table, whose rows count from 0."""
    return table.filter(table["heldout"])


def num_skipped_prompts(table: pa.Table) -> int:
    """Return the number of rows of the data set that ``data.on_long_prompt=skip`` left out."""
    return int((table.schema.metadata or {}).get(_SKIPPED_KEY, b"0"))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    text: str
    by_assistant: bool


def _render_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[_Piece]]:
    """Render the prompt up to the assistant's first turn, and the rest in pieces of one writer each.

    The pieces are found by rendering one turn more each time: with the generation prompt before an
    assistant's turn and without it after the turn. Each rendering must begin with the previous one;
    otherwise the learner would train on tokens that generation never produces.
    """
    turns = [{"role": turn.role, "content": turn.content} for turn in (*example.prompt, *example.reference)]
    start = _apply_template(example.row, tokenizer, turns[: len(example.prompt)], generation=True)
    pieces: list[_Piece] = []
    done = start
    for number in range(len(example.prompt) + 1, len(turns) + 1):
        by_assistant = turns[number - 1]["role"] == "assistant"
        if by_assistant and pieces and not pieces[-1].by_assistant:
            opened = _apply_template(example.row, tokenizer, turns[: number - 1], generation=True)
            pieces.append(_Piece(text=_rest(opened, done, example.row), by_assistant=False))
            done = opened
        ended = _apply_template(example.row, tokenizer, turns[:number], generation=False)
        pieces.append(_Piece(text=_rest(ended, done, example.row), by_assistant=by_assistant))
        done = ended
    return start, pieces


def _apply_template(
    row: int, tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, generation: bool
) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
    except TemplateError as error:
        raise ConfigError(
            f"data row {row}",
            NO_VALUE,
            f"suit the tokenizer's chat template: {first_line(error)}",
            "correct or remove the row",
        ) from None


def _rest(text: str, prefix: str, row: int) -> str:
    if not text.startswith(prefix):
        raise ConfigError(
            f"data row {row}: the tokenizer's chat template",
            NO_VALUE,
            "be prefix-stable (more turns only add text at the end); otherwise loss masks would be wrong",
            "use another template, or data.chat_template=false",
        )
    return text[len(prefix) :]


def _render_plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[_Piece]]:
    prompt = example.prompt[0].content
    if len(example.prompt) > 1 or len(example.reference) > 1:
        raise ConfigError(
            
                "data.chat_template", "false", f"be true for data of several turns (row {example.row})",
                "set it to true, because only a template marks where a turn begins",
            
        )  # fmt: skip
    return prompt, [_Piece(text=turn.content, by_assistant=True) for turn in example.reference]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]


def _prompt_fits(row: int, num_tokens: int, data: DataConfig) -> bool:
    if num_tokens == 0:
        raise ConfigError(
            f"data row {row}", NO_VALUE, "have a prompt of at least one token", "correct or remove the row"
        )
    if num_tokens > data.max_prompt_tokens and data.on_long_prompt == "error":
        raise ConfigError(
            f"prompt of data row {row}",
            f"{num_tokens} tokens",
            f"be <= data.max_prompt_tokens={data.max_prompt_tokens}",
            "raise it, or set data.on_long_prompt=skip",
        )
    return num_tokens <= data.max_prompt_tokens


def _join_reference(
    pieces: Sequence[_Piece], tokens: Sequence[list[int]], stop_token_ids: Sequence[int], limit: int
) -> tuple[list[int] | None, list[bool] | None]:
    """Join the pieces of a reference to token ids and a mask, which covers the assistant's turns.

    Each turn counts up to and including its stop token. Text that the template writes after the
    stop token (a line break) is context for the next turn and is dropped at the end.
    """
    joined: list[int] = []
    mask: list[bool] = []
    for piece, piece_tokens in zip(pieces, tokens, strict=True):
        num_written = 0
        if piece.by_assistant:
            stop = next((i for i, token in enumerate(piece_tokens) if token in stop_token_ids), None)
            if stop is None:
                piece_tokens = [*piece_tokens, *stop_token_ids[:1]]
                stop = len(piece_tokens) - 1
            num_written = stop + 1
        joined += piece_tokens
        mask += [True] * num_written + [False] * (len(piece_tokens) - num_written)
    joined, mask = joined[:limit], mask[:limit]
    while mask and not mask[-1]:
        joined.pop()
        mask.pop()
    if not joined:
        return None, None
    return joined, None if all(mask) else mask


def _as_text(turns: Sequence[Turn]) -> str:
    if len(turns) == 1:
        return turns[0].content
    return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def _choose_heldout(num_rows: int, num_heldout: int, seed: int) -> np.ndarray:
    if num_heldout >= num_rows:
        raise ConfigError(
            "data.num_heldout", num_heldout, f"be < the number of usable rows ({num_rows})",
                 "lower it, because no row would be left to train on"
        )  # fmt: skip
    heldout = np.zeros(num_rows, bool)
    heldout[np.random.default_rng(seed % 2**64).permutation(num_rows)[:num_heldout]] = True
    return heldout
