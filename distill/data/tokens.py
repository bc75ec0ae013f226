"""From text to token ids, so that prompt and reference are the tokens of the whole text.

Tokenizing the two apart and joining the ids gives other tokens than the conversation has: many tokenizers put
a space before every text that they get. So the whole is tokenized at once and cut where the prompt ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill.data.conversation import require_encodable, row_name
from distill.data.render import Rendered
from distill.errors import NO_VALUE, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The token ids of one example."""

    prompt: list[int]
    reference: list[int] | None
    mask: list[bool] | None
    """Per reference token: whether the assistant wrote it. None: it wrote all."""
    cut: bool
    """Whether the reference is longer than the limit and lost its end."""
    merged: bool
    """Whether the whole text has a token across the end of the prompt, which was split for the reference."""


def tokenize(
    texts: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
    *,
    add_special_tokens: bool,
    max_reference_tokens: int,
    references_required: bool = True,
) -> list[Tokens]:
    """Tokenize examples; the prompt's ids are always those that generation starts from.

    A reference ends with the stop token that the template writes after it, or with the first of
    ``stop_token_ids``. ``add_special_tokens``: add those that the tokenizer puts before a text; those that it
    puts after one are left out, because a text that has ended cannot be continued.

    Raises: ConfigError for text that cannot be tokenized, and for a reference that is required and cannot be
    cut off.
    """
    encoder = _Encoder(tokenizer, add_special_tokens)
    prompts = encoder.encode([(text.row, text.prompt) for text in texts])
    with_reference = [text for text in texts if text.written]
    wholes = iter(encoder.encode([(text.row, text.whole) for text in with_reference]))
    found = []
    for text, prompt in zip(texts, prompts, strict=True):
        if not text.written:
            found.append(Tokens(prompt=prompt.ids, reference=None, mask=None, cut=False, merged=False))
            continue
        whole = next(wholes)
        merged = whole.ids[: len(prompt.ids)] != prompt.ids
        try:
            rest = encoder.continuation(text, prompt, whole) if merged else whole.after(len(prompt.ids))
        except ConfigError:
            if references_required:
                raise
            found.append(Tokens(prompt=prompt.ids, reference=None, mask=None, cut=False, merged=False))
            continue
        ids, mask = _reference(rest, text, stop_token_ids)
        cut = len(ids) > max_reference_tokens
        ids, mask = _up_to_written(ids[:max_reference_tokens], mask[:max_reference_tokens])
        reference, mask = ids or None, None if all(mask) else mask
        found.append(Tokens(prompt=prompt.ids, reference=reference, mask=mask, cut=cut, merged=merged))
    return found


@dataclass(frozen=True)
class _Encoding:
    ids: list[int]
    starts: list[int]
    """Character of the text at which each token starts."""

    def after(self, number: int) -> _Encoding:
        return _Encoding(self.ids[number:], self.starts[number:])


class _Encoder:
    """The tokenizer, without the special tokens that it puts after a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool) -> None:
        if not tokenizer.is_fast:
            must = "be a fast one, which knows where in the text a token starts"
            remedy = "use a teacher whose folder has a tokenizer.json"
            raise ConfigError("teacher's tokenizer", type(tokenizer).__name__, must, remedy)
        self._tokenizer = tokenizer
        self._add_special_tokens = add_special_tokens
        # The number of ids that the tokenizer adds after a text.
        added = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        mask: list[int] = added if add_special_tokens else []  # pyright: ignore[reportAssignmentType]
        self._num_trailing = next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def encode(self, texts: Sequence[tuple[int, str]]) -> list[_Encoding]:
        """Encode texts, each given with the number of its row."""
        if not texts:
            return []
        for row, text in texts:
            require_encodable(text, f"data {row_name(row)}")
        encoded: Any = self._tokenizer(
            [text for _, text in texts],
            add_special_tokens=self._add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            _Encoding(*self._cut(ids, [start for start, _ in offsets]))
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _cut(self, ids: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
        end = len(ids) - self._num_trailing
        return ids[:end], starts[:end]

    def continuation(self, text: Rendered, prompt: _Encoding, whole: _Encoding) -> _Encoding:
        """Tokens that continue the prompt's to the whole text, where a token of the whole crosses the border.

        Raises: ConfigError when no split of that token gives the text back.
        """
        border = len(text.prompt)
        wanted = self._decode(whole.ids)
        # Where a token's space is not counted to its start, the crossing token is the first at the border.
        first = next((i for i, start in enumerate(whole.starts) if start >= border), len(whole.ids))
        for number in range(first, min(first + 2, len(whole.ids) + 1)):
            rest = whole.after(number)
            end = rest.starts[0] if rest.ids else len(text.whole)
            for piece in self._pieces(text.whole[border:end]):
                if self._decode([*prompt.ids, *piece, *rest.ids]) == wanted:
                    return _Encoding([*piece, *rest.ids], [*[border] * len(piece), *rest.starts])
        raise ConfigError(
            f"data {row_name(text.row)}",
            NO_VALUE,
            "have a reference whose tokens can be separated from the prompt's",
            "end the prompt before its last space or line break and begin the reference with it, or remove the row",
        )

    def _pieces(self, text: str) -> list[list[int]]:
        """Candidate tokens of a few characters inside a text: alone, and after a character that is cut off."""
        if not text:
            return [[]]
        encode: Any = self._tokenizer
        alone = encode(text, add_special_tokens=False)["input_ids"]
        found = [alone]
        for before in ("\n", "a", "."):
            prefix = encode(before, add_special_tokens=False)["input_ids"]
            both = encode(before + text, add_special_tokens=False)["input_ids"]
            if both[: len(prefix)] == prefix:
                found.append(both[len(prefix) :])
        return found

    def _decode(self, ids: Sequence[int]) -> str:
        decode: Any = self._tokenizer.decode
        return decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _reference(
    rest: _Encoding, text: Rendered, stop_token_ids: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """The ids of a reference and which of them the assistant wrote.

    Each turn counts up to and including its stop token. What the template writes after it (a line break) is
    context for the next turn and is dropped at the end.
    """
    mask = [False] * len(rest.ids)
    for start, end in text.written:
        for i, (token, place) in enumerate(zip(rest.ids, rest.starts, strict=True)):
            if start <= place < end:
                mask[i] = True
                if token in stop_token_ids:
                    break
    ids, mask = _up_to_written(rest.ids, mask)
    if ids and ids[-1] not in stop_token_ids:
        ids, mask = [*ids, *stop_token_ids[:1]], [*mask, *[True] * len(stop_token_ids[:1])]
    return ids, mask


def _up_to_written(ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """Drop the tokens after the last one that the assistant wrote."""
    end = max((i + 1 for i, written in enumerate(mask) if written), default=0)
    return ids[:end], mask[:end]
