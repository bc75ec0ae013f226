"""Prompt and reference are the tokens of the whole text, for every kind of tokenizer and template."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from distill.errors import ConfigError
from tests.unit.data.builders import example
from tests.unit.data.kinds import CHAT, DATA, INLINE, KINDS, WITH_BOS, fast, row_of


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.mark.parametrize("template", [CHAT, WITH_BOS, INLINE], ids=["chat", "bos", "inline"])
@pytest.mark.parametrize("answer", ["It is 0.", " It is 0.", "\nIt is", "  two", "é", "</s>"])
def test_the_whole_conversation_is_tokenized_at_once(kind: Tokenizer, template: str, answer: str) -> None:
    tokenizer = fast(kind, template)
    messages = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": answer}]
    row, num_merged = row_of(example("u:Say hi.", f"a:{answer}"), tokenizer, DATA)
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert row["prompt_tokens"] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    joined = row["prompt_tokens"] + row["reference_tokens"]
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    stop = tokenizer.eos_token_id
    assert joined[-1] == stop and stop not in row["reference_tokens"][:-1]
    if num_merged:
        assert tokenizer.decode(expected).startswith(tokenizer.decode(joined))
    else:
        assert joined == expected[: len(joined)]


@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize(
    ("prompt", "answer"), [("1+1=", "2"), ("Say hi.", " It is"), ("Say ", "hi."), ("a", "b c")]
)
def test_plain_text_is_tokenized_at_once(kind: Tokenizer, adds: str, prompt: str, answer: str) -> None:
    """Without a template, and whatever special tokens the tokenizer adds: none may end the prompt."""
    tokenizer = fast(kind, None, adds=adds)
    row, num_merged = row_of(
        example(f"u:{prompt}", f"a:{answer}"), tokenizer, replace(DATA, chat_template=False)
    )
    stop = tokenizer.eos_token_id
    assert stop not in row["prompt_tokens"]
    assert row["prompt_tokens"] == [t for t in tokenizer(prompt)["input_ids"] if t != stop]
    joined = row["prompt_tokens"] + row["reference_tokens"]
    expected = [t for t in tokenizer(prompt + answer)["input_ids"] if t != stop]
    assert joined[-1] == stop
    assert tokenizer.decode(joined[:-1]) == tokenizer.decode(expected)
    if not num_merged:
        assert joined[:-1] == expected


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="ab .,\n0é☃", min_size=1, max_size=12),
    st.text(alphabet="ab .,\n0é☃", min_size=1, max_size=12),
)
def test_no_text_gains_or_loses_a_character(prompt: str, answer: str) -> None:
    """The reference continues the prompt to the very same text, or the row is refused."""
    for name in ("byte-level", "metaspace first"):
        tokenizer = fast(_CACHE.setdefault(name, KINDS[name]()), None)
        try:
            row, _ = row_of(
                example(f"u:{prompt}", f"a:{answer}"), tokenizer, replace(DATA, chat_template=False)
            )
        except ConfigError as error:
            assert "can be separated" in str(error) or "at least one token" in str(error)
            continue
        if row["reference_tokens"] is None:
            assert not answer.strip()
            continue
        assert tokenizer.decode(row["prompt_tokens"] + row["reference_tokens"][:-1]) == tokenizer.decode(
            tokenizer(prompt + answer)["input_ids"]
        )


_CACHE: dict[str, Tokenizer] = {}


def test_a_crossing_token_is_split_and_counted() -> None:
    tokenizer = fast(KINDS["byte-level"](), None)
    row, num_merged = row_of(example("u:a ", "a:b c"), tokenizer, replace(DATA, chat_template=False))
    assert num_merged == 1
    assert tokenizer.decode(row["prompt_tokens"]) == "a "
    assert tokenizer.decode(row["reference_tokens"]) == "b c</s>"


def test_masks_of_several_turns_follow_the_text(kind: Tokenizer) -> None:
    tokenizer = fast(kind, CHAT)
    row, _ = row_of(example("u:Say hi.", "a:It is 0.", "u:Say it", "a:one"), tokenizer, DATA)
    written = [t for t, kept in zip(row["reference_tokens"], row["reference_mask"], strict=True) if kept]
    assert written.count(tokenizer.eos_token_id) == 2
    text = tokenizer.decode(written).replace(" ", "")  # WordPiece writes a space between all tokens
    assert "Sayit" not in text and "Itis0." in text and "one" in text
