"""Prompt and reference are the tokens of the whole text, for every kind of tokenizer and template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from distill.config import DataConfig
from distill.data import Example, Turn, build_prompts, prompt_facts
from distill.errors import ConfigError
from tests.unit.data.builders import example

TEXTS = [
    "It is 0. It is one, or two?", "user assistant system", "Say hi.\nSay it twice.\n\nGood bye!", "a b c d e f",
    "The answer: 42. No answer.", "éé ☃ ☃", "  spaces   and\ttabs",
]  # fmt: skip
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
WITH_BOS = "<s>" + CHAT
INLINE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
SPECIAL = ["<unk>", "<s>", "</s>"]


def _byte_level(add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *bytes_])
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _legacy_llama() -> Tokenizer:
    """Llama 2's fast tokenizer: the dummy space comes from a normalizer, before every piece of text."""
    tokenizer = _metaspace("never")
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = sorted({letter for text in [*TEXTS, CHAT] for letter in text} | {"▁"})
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=letters
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    letters = sorted({letter for text in [*TEXTS, CHAT] for letter in text if not letter.isspace()})
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=letters)
    tokenizer.train_from_iterator([*TEXTS, CHAT] * 3, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: _byte_level(False),
    "byte-level with a prefix space": lambda: _byte_level(True),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace first": lambda: _metaspace("first"),
    "metaspace never": lambda: _metaspace("never"),
    "legacy llama": _legacy_llama,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def fast(kind: Tokenizer, template: str | None, *, adds: str = "") -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(kind.to_str())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if adds:
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def row_of(row: Example, tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> tuple[dict, int]:
    other = example("u:other words", "a:one", row=1)
    stop = tokenizer.convert_tokens_to_ids("</s>")
    table = build_prompts([row, other], tokenizer, data, [stop])  # type: ignore[list-item]
    return next(found for found in table.to_pylist() if found["data_row"] == 0), prompt_facts(
        table
    ).num_merged


DATA = DataConfig(num_heldout=1, max_reference_tokens=1000, max_prompt_tokens=1000)


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


# The template shows everything


def tools_example(**parts: object) -> Example:
    call = {"function": {"name": "clock", "arguments": {}}}
    reference = (Turn(role="assistant", content="", details={"tool_calls": [call]}),)
    return Example(
        row=0, prompt=(Turn(role="user", content="Time?"),), reference=reference, tools=({"name": "clock"},)
    )


SHOWS_CALLS = CHAT.replace(
    "m['content'] +", "m['content'] + (m['tool_calls'][0]['function']['name'] if m['tool_calls'] else '') +"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHAT, "data row 0: its tools must be shown by the tokenizer's chat template, which ignores tools"),
        ("{{ tools }}" + CHAT, "data row 0: the assistant's turn=\"clock\" must be shown by the tokenizer's"),
        ("{{ tools }}" + SHOWS_CALLS, None),
    ],
)
def test_tools_and_calls_reach_the_text_or_are_refused(template: str, message: str | None) -> None:
    tokenizer = fast(KINDS["byte-level"](), template)
    if message is None:
        row, _ = row_of(tools_example(), tokenizer, DATA)
        assert "clock" in tokenizer.decode(row["prompt_tokens"])
        assert tokenizer.decode(row["reference_tokens"]) == "clock</s>"
        return
    with pytest.raises(ConfigError, match=message):
        row_of(tools_example(), tokenizer, DATA)


def test_a_template_that_drops_the_system_turn_is_refused() -> None:
    template = "{% for m in messages if m['role'] != 'system' %}" + CHAT.partition("%}")[2]
    with pytest.raises(ConfigError, match=r"data row 0: the system's turn=\"Be kind\" must be shown"):
        row_of(example("s:Be kind", "u:Q", "a:A"), fast(KINDS["byte-level"](), template), DATA)


REASONING = CHAT.replace("m['content'] +", "m['content'].split('</think>')[-1] +")


def test_a_template_that_drops_reasoning_is_refused_only_for_references() -> None:
    tokenizer = fast(KINDS["byte-level"](), REASONING)
    with pytest.raises(ConfigError, match="data row 0: the assistant's turn="):
        row_of(example("u:Q", "a:<think>why</think>A"), tokenizer, DATA)
    history = Example(
        row=0,
        prompt=example("u:P", "a:<think>why</think>A", "u:Q").prompt
        + example("u:P", "a:<think>why</think>A", "u:Q").reference,
        reference=(Turn(role="assistant", content="B"),),
    )
    row, _ = row_of(history, tokenizer, DATA)
    assert "why" not in tokenizer.decode(row["prompt_tokens"])


WITH_TOOLS = "{{ tools }}" + CHAT.replace(
    "m['content'] +",
    "m['content'] + (m.reasoning_content or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') +",
)


def answer_of(**details: object) -> Example:
    reference = (Turn(role="assistant", content="A", details=details),)
    return Example(row=0, prompt=(Turn(role="user", content="Q"),), reference=reference)


def call_of(**arguments: object) -> dict:
    return {"tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("part", "dropping"),
    [
        (answer_of(**call_of(town="Graz")), ("m['tool_calls'] | tojson", "'clock'")),
        (answer_of(**call_of(day=31)), ("m['tool_calls'] | tojson", "'clock day'")),
        (
            answer_of(**call_of(place={"deep": ['Graz "é"']})),
            ("m['tool_calls'] | tojson", "'clock place deep'"),
        ),
        (answer_of(reasoning_content="because"), ("m.reasoning_content", "''")),
    ],
)
def test_every_part_of_an_answer_reaches_the_text(part: Example, dropping: tuple[str, str]) -> None:
    row_of(part, fast(KINDS["byte-level"](), WITH_TOOLS), DATA)
    with pytest.raises(ConfigError, match=r"data row 0: the assistant's turn=.* must be shown by"):
        row_of(part, fast(KINDS["byte-level"](), WITH_TOOLS.replace(*dropping)), DATA)


def test_a_dropped_turn_is_found_even_if_its_words_are_elsewhere() -> None:
    template = "{% for m in messages if m['role'] != 'system' %}" + CHAT.partition("%}")[2]
    with pytest.raises(ConfigError, match=r"data row 0: the system's turn=\"Be kind\" must be shown"):
        row_of(example("s:Be kind", "u:Be kind, please", "a:A"), fast(KINDS["byte-level"](), template), DATA)


def test_a_template_that_drops_earlier_answers_is_refused() -> None:
    template = CHAT.replace("m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else '') +")
    turns = example("u:P", "a:earlier", "u:Q")
    history = Example(row=0, prompt=turns.prompt + turns.reference, reference=answer_of().reference)
    with pytest.raises(ConfigError, match=r"data row 0: the assistant's turn=\"earlier\" must be shown"):
        row_of(history, fast(KINDS["byte-level"](), template), DATA)


def test_a_template_that_writes_a_tool_without_its_name_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "clock"}}
    row = Example(row=0, prompt=(Turn(role="user", content="Time?"),), tools=(tool,))
    row_of(row, fast(KINDS["byte-level"](), "{{ tools }}" + CHAT), DATA)
    template = "{% for tool in tools or [] %}{{ tool.name }},{% endfor %}" + CHAT
    with pytest.raises(ConfigError, match=r"data row 0: its tool=\"clock\" must be shown"):
        row_of(row, fast(KINDS["byte-level"](), template), DATA)


def test_names_that_the_template_does_not_show_are_counted() -> None:
    row = Example(row=0, prompt=(Turn(role="user", content="Q", details={"name": "Zoe"}),))
    for template, count in ((CHAT, 1), (CHAT.replace("m['role'] +", "m['role'] + m.name|string +"), 0)):
        rows, stop = [row, example("u:other", row=1)], [2]
        table = build_prompts(rows, fast(KINDS["byte-level"](), template), DATA, stop)  # type: ignore[list-item]
        assert prompt_facts(table).num_hidden_names == count


def test_several_turns_without_any_template_have_a_remedy_that_works() -> None:
    tokenizer = fast(KINDS["byte-level"](), None)
    with pytest.raises(ConfigError, match="use a teacher whose tokenizer has a chat template"):
        row_of(example("u:Q", "a:A", "u:R", "a:B"), tokenizer, replace(DATA, chat_template=False))


def test_later_answers_can_be_left_out_where_a_template_changes_earlier_turns() -> None:
    tokenizer = fast(
        KINDS["byte-level"](),
        CHAT.replace("m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else '-') +"),
    )
    row = example("u:Q", "a:A", "u:R", "a:B")
    with pytest.raises(
        ConfigError, match=r"data row 0: .* prefix-stable .*; set data\.reference_turns=first; or use"
    ):
        row_of(row, tokenizer, DATA)
    rows = [row, example("u:other words", "a:one", row=1)]
    first = replace(DATA, reference_turns="first")
    table = build_prompts(rows, tokenizer, first, [tokenizer.eos_token_id])  # type: ignore[list-item]
    found = next(row for row in table.to_pylist() if row["data_row"] == 0)
    assert (tokenizer.decode(found["reference_tokens"]), found["reference_text"]) == ("A</s>", "A")
    assert prompt_facts(table).num_dropped_turns == 1


def test_an_unstable_template_matters_only_where_references_are_trained_on() -> None:
    tokenizer = fast(KINDS["byte-level"](), "{{ messages|length }}" + CHAT)
    rows = [example("u:Q", "a:A", "u:R", "a:B"), example("u:other", "a:one", row=1)]
    stop = tokenizer.eos_token_id
    with pytest.raises(ConfigError, match=r"prefix-stable .* set sft\.enabled=false"):
        build_prompts(rows, tokenizer, DATA, [stop])  # type: ignore[list-item]
    table = build_prompts(rows, tokenizer, DATA, [stop], with_references=False)  # type: ignore[list-item]
    assert table["reference_tokens"].null_count == 2
    assert "A" in table["reference_text"].to_pylist()[0] + table["reference_text"].to_pylist()[1]
