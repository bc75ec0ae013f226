"""Small tokenizers of every kind, trained on a few texts, and the table row that one gives."""

from __future__ import annotations

from collections.abc import Callable

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
from distill.data import Example, build_prompts, prompt_facts
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
