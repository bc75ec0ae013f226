"""The prompt table: tokens and masks, rows that are skipped, rows that are held out."""

from __future__ import annotations

import dataclasses
import re

import pytest

from distill.data import build_prompts, heldout_rows, prompt_facts, training_rows
from distill.errors import ConfigError
from tests.unit.data.builders import (
    DATA,
    STOP,
    TEMPLATE,
    example,
    many,
    only_row,
    with_template,
    without_template,
    written,
)

# Tokens and masks


def test_a_prompt_ends_where_the_assistant_begins(tokenizer):
    row = only_row(example("u:Hi", "a:Yo"), tokenizer)
    assert tokenizer.decode(row["prompt_tokens"]) == "<s>user\nHi</s>\n<s>assistant\n"
    assert tokenizer.decode(row["reference_tokens"]) == "Yo</s>"
    assert row["reference_tokens"][-1] == STOP
    assert row["reference_mask"] is None
    assert (row["prompt_text"], row["reference_text"]) == ("Hi", "Yo")


def test_only_the_assistants_turns_count(tokenizer):
    turns = ("s:Be kind", "u:Q", "a:A", "u:R", "a:BC")
    row = only_row(example(*turns), tokenizer)
    assert tokenizer.decode(row["prompt_tokens"]) == "<s>system\nBe kind</s>\n<s>user\nQ</s>\n<s>assistant\n"
    reference = "A</s>\n<s>user\nR</s>\n<s>assistant\nBC</s>"
    assert tokenizer.decode(row["reference_tokens"]) == reference
    assert written(tokenizer, row) == "A</s>BC</s>"
    assert row["prompt_text"] == "system: Be kind\nuser: Q"
    messages = [
        {"role": t.role, "content": t.content} for t in (*example(*turns).prompt, *example(*turns).reference)
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row["prompt_tokens"]) + reference + "\n" == whole


def test_a_users_turn_at_the_end_is_not_part_of_the_reference(tokenizer):
    row = only_row(example("u:Q", "a:A", "u:R"), tokenizer)
    assert tokenizer.decode(row["reference_tokens"]) == "A</s>"
    assert row["reference_mask"] is None


def test_two_turns_of_the_assistant_in_a_row(tokenizer):
    row = only_row(example("u:Q", "a:A", "a:B"), tokenizer)
    assert written(tokenizer, row).replace("<s>assistant\n", "") == "A</s>B</s>"


def test_a_template_that_does_not_end_a_turn_gets_the_stop_token(tokenizer):
    open_ended = with_template(tokenizer, "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    row = only_row(example("u:Q", "a:A"), open_ended)
    assert row["reference_tokens"][-1] == STOP
    assert tokenizer.decode(row["reference_tokens"]) == "A </s>"


def test_references_are_cut(tokenizer):
    data = dataclasses.replace(DATA, max_reference_tokens=4)
    row = only_row(example("u:Q", "a:abcdef"), tokenizer, data)
    assert tokenizer.decode(row["reference_tokens"]) == "abcd"
    cut_in_users_turn = only_row(example("u:Q", "a:A", "u:R", "a:B"), tokenizer, data)
    assert tokenizer.decode(cut_in_users_turn["reference_tokens"]) == "A</s>"
    assert cut_in_users_turn["reference_mask"] is None


def test_no_reference_is_null(tokenizer):
    row = only_row(example("u:Q"), tokenizer)
    assert (row["reference_tokens"], row["reference_mask"], row["reference_text"]) == (None, None, None)


def test_plain_text(tokenizer):
    data = dataclasses.replace(DATA, chat_template=False)
    row = only_row(example("u:1+1=", "a:2"), without_template(tokenizer), data)
    assert tokenizer.decode(row["prompt_tokens"]) == "1+1="
    assert tokenizer.decode(row["reference_tokens"]) == "2</s>"
    with pytest.raises(ConfigError, match=r"data.chat_template=false must be true for data of several turns"):
        only_row(example("u:Q", "a:A", "u:R", "a:B"), tokenizer, data)


def test_unsuitable_templates_are_rejected(tokenizer):
    with pytest.raises(
        ConfigError,
        match=r"data.chat_template=true must be false for a tokenizer without chat template; set it to false",
    ):
        only_row(example("u:Q", "a:A"), without_template(tokenizer))
    counting = with_template(tokenizer, "{{ messages|length }}" + TEMPLATE)
    with pytest.raises(ConfigError, match=r"data row 1: .* must be prefix-stable"):
        only_row(example("u:Q", "a:A"), counting)
    refusing = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match=r"data row 1 must suit .* roles must alternate"):
        only_row(example("u:Q", "a:A"), refusing)


# The table


def test_a_long_prompt_is_rejected_or_skipped(tokenizer):
    rows = [*many(5), example("u:" + "x" * 100, "a:A", row=5), *many(1)]
    data = dataclasses.replace(DATA, max_prompt_tokens=60)
    with pytest.raises(
        ConfigError,
        match=r"^prompt of data row 6=1\d\d tokens must be <= data\.max_prompt_tokens=60; "
        r"raise it, or set data\.on_long_prompt=skip$",
    ):
        build_prompts(rows, tokenizer, data, [STOP])
    table = build_prompts(rows, tokenizer, dataclasses.replace(data, on_long_prompt="skip"), [STOP])
    assert table.num_rows == 6
    assert prompt_facts(table).num_long == 1
    for row in table.to_pylist():  # the references are not shifted by one
        assert tokenizer.decode(row["reference_tokens"]) == f"answer {row['data_row']}</s>"


def test_held_out_rows_come_last_and_depend_on_the_seed(tokenizer):
    data = dataclasses.replace(DATA, num_heldout=7)
    table = build_prompts(many(20), tokenizer, data, [STOP], seed=3)
    again = build_prompts(many(20), tokenizer, data, [STOP], seed=3)
    other = build_prompts(many(20), tokenizer, data, [STOP], seed=-4)
    assert table.equals(again)
    assert table["data_row"].to_pylist() != other["data_row"].to_pylist()
    assert table["heldout"].to_pylist() == [False] * 13 + [True] * 7
    training, heldout = training_rows(table), heldout_rows(table)
    assert training["data_row"].to_pylist() == sorted(training["data_row"].to_pylist())
    assert sorted(training["data_row"].to_pylist() + heldout["data_row"].to_pylist()) == list(range(20))
    assert training.equals(table.slice(0, 13))


def test_holding_out_every_row_is_rejected(tokenizer):
    data = dataclasses.replace(DATA, num_heldout=3)
    with pytest.raises(ConfigError, match=r"data.num_heldout=3 must be < the number of usable rows \(3\)"):
        build_prompts(many(3), tokenizer, data, [STOP])
    rows = [*many(3), example("u:" + "x" * 100, "a:A", row=3)]
    data = dataclasses.replace(data, max_prompt_tokens=60, on_long_prompt="skip")
    with pytest.raises(
        ConfigError,
        match=r"usable rows \(3; rows left out for a long prompt: 1\); lower it, .*; or raise data.max",
    ):
        build_prompts(rows, tokenizer, data, [STOP])


def test_prompts_that_are_all_too_long_are_named_as_the_cause(tokenizer):
    data = dataclasses.replace(DATA, max_prompt_tokens=5, on_long_prompt="skip")
    with pytest.raises(
        ConfigError,
        match=r"^data.max_prompt_tokens=5 must leave a prompt to train on: all 7 prompts are longer, the shortest "
        r"has (\d+) tokens; raise it$",
    ) as caught:
        build_prompts(many(7), tokenizer, data, [STOP])
    (shortest,) = re.findall(r"has (\d+) tokens", str(caught.value))
    assert build_prompts(
        many(7), tokenizer, dataclasses.replace(data, max_prompt_tokens=int(shortest)), [STOP]
    )


def test_an_empty_prompt_is_rejected(tokenizer):
    data = dataclasses.replace(DATA, chat_template=False)
    with pytest.raises(ConfigError, match=r"data row 1 must have a prompt of at least one token"):
        only_row(example("u:", "a:A"), without_template(tokenizer), data)


def test_prompts_that_repeat_a_held_out_one_are_not_trained_on(tokenizer):
    """Whatever the seed holds out; and where nothing repeats, the choice is the one that it always was."""
    texts = ["a", "b", "a", "c", "b", "a", "d", "e"]
    rows = [example(f"u:{text}", f"a:{number}", row=number) for number, text in enumerate(texts)]
    for seed in range(20):
        table = build_prompts(rows, tokenizer, dataclasses.replace(DATA, num_heldout=2), [STOP], seed=seed)
        training, heldout = (
            set(part(table)["prompt_text"].to_pylist()) for part in (training_rows, heldout_rows)
        )
        assert not training & heldout and table["heldout"].to_pylist().count(True) == 2
        left_out = len(texts) - table.num_rows
        assert prompt_facts(table).num_repeated == left_out
        expected = texts.count  # every repeat of a held-out prompt, and nothing else
        assert left_out == sum(expected(text) for text in heldout) - 2
        assert prompt_facts(table).num_duplicates == 3  # two more "a" and one more "b"
    with pytest.raises(ConfigError, match="all 3 usable rows are held out or repeat a held-out prompt"):
        build_prompts([example("u:a", f"a:{i}", row=i) for i in range(3)], tokenizer, DATA, [STOP])


def test_references_that_are_cut_are_counted(tokenizer):
    rows = [example("u:Q", "a:abc"), example("u:R", "a:abcd", row=1), example("u:S", row=2)]
    table = build_prompts(rows, tokenizer, dataclasses.replace(DATA, max_reference_tokens=4), [STOP])
    assert prompt_facts(table).num_cut == 1  # "abc" and its stop token fit
    words = prompt_facts(table).described()
    assert words["references cut to data.max_reference_tokens"] == 1
    assert len(words) == len(dataclasses.fields(prompt_facts(table)))
