"""The prompt table: the only place where text becomes tokens.

Generator, teacher and learner all use its token ids. It has one row per prompt: the training rows
come first and the held-out rows after them, both in the order of the data set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from distill.config import DataConfig
from distill.data.conversation import Example, row_name
from distill.data.render import Rendered, as_text, render_chat, render_plain
from distill.data.tokens import Tokens, tokenize
from distill.errors import NO_VALUE, ConfigError

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

_FACTS_KEY = b"distill.prompt_facts"


@dataclass(frozen=True, kw_only=True)
class PromptFacts:
    """What happened to the rows of a data set on their way into the prompt table."""

    num_long: int = 0
    """Rows that ``data.on_long_prompt=skip`` left out."""
    num_repeated: int = 0
    """Rows that were left out of training because their prompt is held out."""
    num_duplicates: int = 0
    """Rows whose prompt an earlier row has as well, those of ``num_repeated`` included."""
    num_cut: int = 0
    """References that ``data.max_reference_tokens`` cut."""
    num_dropped_turns: int = 0
    """Rows whose later answers ``data.reference_turns=first`` left out."""
    num_hidden_names: int = 0
    """Rows with names of speakers that the chat template does not show."""
    num_merged: int = 0
    """References that begin inside a token of the whole text."""

    def described(self) -> dict[str, int]:
        """The numbers by what they count, in words."""
        return {
            "rows left out because their prompt is too long": self.num_long,
            "rows whose prompt an earlier row has too": self.num_duplicates,
            "rows left out of training because their prompt is held out": self.num_repeated,
            "references cut to data.max_reference_tokens": self.num_cut,
            "rows whose later answers data.reference_turns=first leaves out": self.num_dropped_turns,
            "rows with names of speakers that the chat template does not show": self.num_hidden_names,
            "references that begin inside a token of the whole text, which is split": self.num_merged,
        }


def build_prompts(
    rows: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    stop_token_ids: Sequence[int],
    seed: int = 0,
    *,
    references_required: bool = True,
) -> pa.Table:
    """Build the prompt table (columns: ``PROMPT_SCHEMA``); :func:`prompt_facts` reads what was left out.

    ``stop_token_ids``: those of the teacher; the first one ends a reference that the template does
    not end. ``seed`` determines which rows are held out. ``references_required=False``: nothing trains on the
    references, so one that cannot be rendered or cut off has no tokens instead of raising an error.

    Raises: ConfigError for an empty prompt or one over the limit, for a template that is missing or
    unsuitable, and when no row would be left to train on.
    """
    if data.chat_template and not tokenizer.chat_template:
        raise ConfigError(
            "data.chat_template", "true", "be false for a tokenizer without chat template", "set it to false"
        )
    num_dropped_turns = 0
    if data.reference_turns == "first":
        num_dropped_turns = sum(len(example.reference) > 1 for example in rows)
        rows = [replace(example, reference=example.reference[:1]) for example in rows]
    rendered = [_rendered(example, tokenizer, data, references_required) for example in rows]
    # A template writes its own special tokens. Plain text gets those that the tokenizer puts before a text.
    tokens = tokenize(
        rendered,
        tokenizer,
        stop_token_ids,
        add_special_tokens=not data.chat_template,
        max_reference_tokens=data.max_reference_tokens,
        references_required=references_required,
    )
    kept = [
        (example, found)
        for example, found in zip(rows, tokens, strict=True)
        if _prompt_fits(example.row, len(found.prompt), data)
    ]
    if rows and not kept:
        raise _all_too_long([len(found.prompt) for found in tokens], data)
    heldout = _choose_heldout(len(kept), len(rows) - len(kept), data.num_heldout, seed)
    repeated = _repeats_heldout([found.prompt for _, found in kept], heldout)
    if len(kept) and repeated.sum() + heldout.sum() == len(kept):
        must = f"leave a prompt to train on: all {len(kept)} usable rows are held out or repeat a held-out prompt"
        raise ConfigError("data.num_heldout", data.num_heldout, must, "lower it, or add other prompts")
    facts = PromptFacts(
        num_long=len(rows) - len(kept),
        num_repeated=int(repeated.sum()),
        num_duplicates=len(kept) - len({tuple(found.prompt) for _, found in kept}),
        num_cut=sum(found.cut for _, found in kept),
        num_dropped_turns=num_dropped_turns,
        num_hidden_names=sum(text.hides_names for text in rendered),
        num_merged=sum(found.merged for _, found in kept),
    )
    table = _table(kept, heldout, facts)
    order = np.argsort(heldout, kind="stable")
    return table.take(order[~repeated[order]])


def _rendered(
    example: Example, tokenizer: PreTrainedTokenizerBase, data: DataConfig, references_required: bool
) -> Rendered:
    def render(*, with_reference: bool) -> Rendered:
        if data.chat_template:
            return render_chat(example, tokenizer, with_reference=with_reference)
        has_template = bool(tokenizer.chat_template)
        return render_plain(example, with_reference=with_reference, has_template=has_template)

    try:
        return render(with_reference=True)
    except ConfigError:
        if references_required:
            raise
    return render(with_reference=False)


def _table(rows: Sequence[tuple[Example, Tokens]], heldout: np.ndarray, facts: PromptFacts) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "prompt_tokens": [found.prompt for _, found in rows],
        "reference_tokens": [found.reference for _, found in rows],
        "reference_mask": [found.mask for _, found in rows],
        "prompt_text": [as_text(example.prompt) for example, _ in rows],
        "reference_text": [as_text(example.reference) if example.reference else None for example, _ in rows],
        "heldout": heldout.tolist(),
        "data_row": [example.row for example, _ in rows],
    }
    metadata = {_FACTS_KEY: json.dumps(asdict(facts)).encode()}
    return pa.table(columns, schema=PROMPT_SCHEMA.with_metadata(metadata))


def training_rows(table: pa.Table) -> pa.Table:
    """Return the rows of a prompt table that are not held out; each row keeps its number."""
    return table.filter(pa.array(~table["heldout"].to_numpy()))


def heldout_rows(table: pa.Table) -> pa.Table:
    """Return the held-out rows of a prompt table as a separate table, whose rows count from 0."""
    return table.filter(table["heldout"])


def prompt_facts(table: pa.Table) -> PromptFacts:
    """Return what :func:`build_prompts` recorded with a table; zeros for what it did not record yet."""
    return PromptFacts(**json.loads((table.schema.metadata or {}).get(_FACTS_KEY, b"{}")))


def _prompt_fits(row: int, num_tokens: int, data: DataConfig) -> bool:
    if num_tokens == 0:
        raise ConfigError(
            f"data {row_name(row)}",
            NO_VALUE,
            "have a prompt of at least one token",
            "correct or remove the row",
        )
    if num_tokens > data.max_prompt_tokens and data.on_long_prompt == "error":
        raise ConfigError(
            f"prompt of data {row_name(row)}",
            f"{num_tokens} tokens",
            f"be <= data.max_prompt_tokens={data.max_prompt_tokens}",
            "raise it, or set data.on_long_prompt=skip",
        )
    return num_tokens <= data.max_prompt_tokens


def _all_too_long(lengths: Sequence[int], data: DataConfig) -> ConfigError:
    must = f"leave a prompt to train on: all {len(lengths)} prompts are longer, the shortest has {min(lengths)} tokens"
    return ConfigError("data.max_prompt_tokens", data.max_prompt_tokens, must, "raise it")


def _choose_heldout(num_rows: int, num_long: int, num_heldout: int, seed: int) -> np.ndarray:
    if num_heldout >= num_rows:
        long = f"; rows left out for a long prompt: {num_long}" if num_long else ""
        must = f"be < the number of usable rows ({num_rows}{long})"
        remedy = "lower it, because no row would be left to train on"
        remedy += "; or raise data.max_prompt_tokens" if num_long else ""
        raise ConfigError("data.num_heldout", num_heldout, must, remedy)
    heldout = np.zeros(num_rows, bool)
    heldout[np.random.default_rng(seed % 2**64).permutation(num_rows)[:num_heldout]] = True
    return heldout


def _repeats_heldout(prompts: Sequence[Sequence[int]], heldout: np.ndarray) -> np.ndarray:
    """Per row: whether it is not held out, but another row with the same prompt is."""
    known = {tuple(prompt) for prompt, is_heldout in zip(prompts, heldout, strict=True) if is_heldout}
    return np.array([tuple(prompt) in known for prompt in prompts], bool) & ~heldout
