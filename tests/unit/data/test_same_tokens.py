"""Ordinary data gives the tokens, and the held-out rows, that it has always given: committed results rely on them."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.config import DataConfig
from distill.data import build_prompts
from tests.unit.data.builders import TEMPLATE, example

MERGES = [("i", "t"), ("Ġ", "it"), ("s", "a"), ("sa", "y"), ("i", "s"), ("Ġ", "is"), ("h", "i"), ("Ġ", "hi")]
HEADER, FOOTER = [264, 84, 82, 68, 81, 198], [265, 198, 264, 64, 82, 82, 260, 83, 64, 77, 83, 198]
PROMPTS = {
    row: [259, 257, 220, digit] for row, digit in ((0, 15), (2, 17), (3, 18), (5, 20), (1, 16), (4, 19))
}
REFERENCES = {
    row: [256, 261, 220, digit, 13, 265]
    for row, digit in ((0, 15), (2, 16), (3, 23), (5, 24), (1, 22), (4, 17))
}
"""By row of the data set, in the order of the table: four training rows, and then two that are held out."""


def merging_tokenizer() -> PreTrainedTokenizerFast:
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES), "<s>", "</s>"]
    bpe = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=MERGES))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("chat_template", [True, False])
def test_tokens_and_held_out_rows_are_those_of_the_first_version(chat_template: bool) -> None:
    data = DataConfig(num_heldout=2, chat_template=chat_template, max_reference_tokens=6)
    rows = [example(f"u:say it {row}", f"a:it is {row * 7 % 13}.", row=row) for row in range(6)]
    table = build_prompts(rows, merging_tokenizer(), data, [265], seed=5)
    expected = [[*HEADER, *prompt, *FOOTER] if chat_template else prompt for prompt in PROMPTS.values()]
    assert table["data_row"].to_pylist() == list(PROMPTS)
    assert table["heldout"].to_pylist() == [False] * 4 + [True] * 2
    assert table["prompt_tokens"].to_pylist() == expected
    assert table["reference_tokens"].to_pylist() == list(REFERENCES.values())
    assert table["reference_mask"].null_count == len(rows)
