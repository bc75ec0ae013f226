"""Data: every format, tokens and masks, the prompt table, draws as requests and rows, Parquet."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill import data as distill_data
from distill.config import DataConfig
from distill.data import (
    Example,
    PromptTable,
    TextCorpus,
    Turn,
    build_prompts,
    corpus_table,
    heldout_rows,
    load_rows,
    num_skipped_prompts,
    read_table,
    reference_corpus,
    sample_seed,
    training_rows,
    write_table,
)
from distill.errors import ConfigError
from distill.interfaces import Completion, Draw
from distill.schema import SchemaError, trajectory_batch, validate, with_teacher_hidden

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
BOS, STOP = 256, 257
DATA = DataConfig(num_heldout=1)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a token is a byte, so tests can read tokens as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    assert (fast.bos_token_id, fast.eos_token_id) == (BOS, STOP)
    return fast


def without_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_template(tokenizer, None)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    other.chat_template = template
    return other


def example(*turns: str, row: int = 0) -> Example:
    """Turns written "u:hello", "a:hi"."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    parsed = tuple(Turn(role=roles[turn[0]], content=turn[2:]) for turn in turns)
    first = next((i for i, turn in enumerate(parsed) if turn.role == "assistant"), len(parsed))
    return Example(row=row, prompt=parsed[:first], reference=parsed[first:])


def only_row(example_: Example, tokenizer, data: DataConfig = DATA) -> dict:
    """The table row of an example; a second one is there to be held out."""
    other = example("u:other", "a:one", row=1)
    table = build_prompts([example_, other], tokenizer, data, [STOP])
    return next(row for row in table.to_pylist() if row["data_row"] == 0)


def written(tokenizer, row: dict) -> str:
    """The reference tokens that the loss counts, as text."""
    mask = row["reference_mask"] or [True] * len(row["reference_tokens"])
    return tokenizer.decode([t for t, m in zip(row["reference_tokens"], mask, strict=True) if m])


# Loading


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def load(path: Path, **settings) -> list[Example]:
    return load_rows(DataConfig(path=str(path), **settings), Path("no-cache"))


FORMATS = {
    "prompt_completion": (
        [{"prompt": "Hi é", "completion": "Yo"}, {"prompt": "A", "completion": "B"}],
        [example("u:Hi é", "a:Yo"), example("u:A", "a:B", row=1)],
    ),
    "messages": (
        [
            {
                "messages": [
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                    {"role": "user", "content": "R"},
                    {"role": "assistant", "content": "B"},
                ]
            }
        ],
        [example("s:S", "u:Q", "a:A", "u:R", "a:B")],
    ),
    "instruction": (
        [
            {"instruction": "Sum", "input": "1 2", "output": "3"},
            {"instruction": "Say", "input": "", "output": "x"},
        ],
        [example("u:Sum\n\n1 2", "a:3"), example("u:Say", "a:x", row=1)],
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_from_every_file(tmp_path, name, suffix):
    rows, expected = FORMATS[name]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    assert load(path) == expected
    assert load(path, format=name) == expected


def test_prompt_and_completion_as_turns(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "Q"}],
        "completion": [{"role": "assistant", "content": "A"}],
    }
    assert load(write_rows(tmp_path / "rows.jsonl", [row])) == [example("u:Q", "a:A")]


@pytest.mark.parametrize(
    "row", [{"prompt": "Q"}, {"prompt": "Q", "completion": None}, {"instruction": "Q", "input": None}]
)
def test_a_reference_may_be_missing(tmp_path, row):
    assert load(write_rows(tmp_path / "rows.jsonl", [row])) == [example("u:Q")]


def test_blank_lines_and_byte_order_mark(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert [e.prompt[0].content for e in load(tmp_path / "rows.jsonl")] == ["a", "b"]


def test_a_hub_id_goes_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_list([{"prompt": "Q", "completion": "A"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(DataConfig(path="owner/set", split="test"), Path()) == [example("u:Q", "a:A")]
    assert asked == [("owner/set", "test")]


@pytest.mark.parametrize("error", [ConnectionError, ValueError, "DatasetNotFoundError"])
def test_a_hub_id_that_fails_is_one_line(monkeypatch, error):
    import datasets

    kind = getattr(datasets.exceptions, error) if isinstance(error, str) else error

    def load_dataset(path, split):
        raise kind("no such thing\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ConfigError, match=r"^data\.path=alpaca-dmo must .*: no such thing; did you mean alpaca-demo\?$"
    ):
        load_rows(DataConfig(path="alpaca-dmo"), Path())


def test_a_known_name_lies_in_the_cache(tmp_path):
    with pytest.raises(ConfigError, match="run `distill data fetch alpaca-demo`"):
        load_rows(DataConfig(path="alpaca-demo"), tmp_path)
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "alpaca-demo.json", FORMATS["instruction"][0])
    assert load_rows(DataConfig(path="alpaca-demo"), tmp_path) == FORMATS["instruction"][1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a",}', "line 17 must be JSON: Illegal trailing comma|line 17 must be JSON: Expecting property name"),
        (b'["a"]', "line 17 must be a JSON object, is a list"),
        (b'{"prompt": "caf\xe9"}', "line 17 must be UTF-8, byte 15 is not"),
    ],
)  # fmt: skip
def test_line_17_is_broken(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' * 16 + line + b'\n{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.json", '[{"prompt": "a"},\n {"prompt" "b"}]', "line 2 must be JSON: Expecting ':' delimiter in column 12"),
        ("rows.json", '{"prompt": "a"}', "must be a JSON list of objects, is an object"),
        ("rows.json", '[{"prompt": "a"}, 3]', "row 1 must be a JSON object, is a number"),
        ("rows.parquet", "not parquet", "must be a Parquet file"),
        ("rows.jsonl", "\n", "must have at least one row; it is empty"),
        ("rows.json", "[]", "must have at least one row; it is empty"),
        ("rows.jsonl", '{"text": "a", "id": 3}', "row 0 must have a column messages, or prompt, or instruction, has text, id"),
        ("rows.jsonl", '{"prompt": "a"}\n{"completion": "b"}', "row 1 must have a value in column prompt .*, has completion"),
        ("rows.jsonl", '{"prompt": 3}', "row 0 column prompt must be a text or a list of turns, is a number"),
        ("rows.jsonl", '{"messages": [{"role": "user"}]}', "turn 0 must have a text as content, has null"),
        ("rows.jsonl", '{"messages": ["x"]}', "turn 0 must have role and content"),
        ("rows.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}', "must have a turn before the assistant's"),
        ("rows.jsonl", '{"messages": []}', "must have a turn before the assistant's"),
    ],
)  # fmt: skip
def test_broken_data_says_where(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_no_hub_id(tmp_path):
    with pytest.raises(ConfigError, match="must be a file that exists"):
        load(tmp_path / "nowhere.jsonl")


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


def test_a_users_turn_at_the_end_is_no_reference(tokenizer):
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


def test_unfit_templates(tokenizer):
    with pytest.raises(ConfigError, match=r"data.chat_template=true must be false; .* no chat template"):
        only_row(example("u:Q", "a:A"), without_template(tokenizer))
    counting = with_template(tokenizer, "{{ messages|length }}" + TEMPLATE)
    with pytest.raises(ConfigError, match=r"data row 0: .* must be prefix-stable"):
        only_row(example("u:Q", "a:A"), counting)
    refusing = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match=r"data row 0 must suit .* roles must alternate"):
        only_row(example("u:Q", "a:A"), refusing)


# The table


def many(num_rows: int) -> list[Example]:
    return [example(f"u:prompt {row}", f"a:answer {row}", row=row) for row in range(num_rows)]


def test_a_long_prompt_is_refused_or_skipped(tokenizer):
    rows = [*many(5), example("u:" + "x" * 100, "a:A", row=5), *many(1)]
    data = dataclasses.replace(DATA, max_prompt_tokens=60)
    with pytest.raises(
        ConfigError,
        match=r"^prompt of data row 5=1\d\d tokens must be <= data\.max_prompt_tokens=60; "
        r"raise it or set data\.on_long_prompt=skip$",
    ):
        build_prompts(rows, tokenizer, data, [STOP])
    table = build_prompts(rows, tokenizer, dataclasses.replace(data, on_long_prompt="skip"), [STOP])
    assert table.num_rows == 6
    assert num_skipped_prompts(table) == 1
    for row in table.to_pylist():  # the references did not slip by one
        assert tokenizer.decode(row["reference_tokens"]) == f"answer {row['data_row']}</s>"


def test_held_out_rows_lie_last_and_follow_the_seed(tokenizer):
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


def test_something_must_be_left_to_train_on(tokenizer):
    data = dataclasses.replace(DATA, num_heldout=3)
    with pytest.raises(ConfigError, match=r"data.num_heldout=3 must be < the number of usable rows \(3\)"):
        build_prompts(many(3), tokenizer, data, [STOP])


def test_an_empty_prompt_is_refused(tokenizer):
    data = dataclasses.replace(DATA, chat_template=False)
    with pytest.raises(ConfigError, match=r"data row 0 must have a prompt of at least one token"):
        only_row(example("u:", "a:A"), without_template(tokenizer), data)


# Draws


@pytest.fixture
def table(tokenizer) -> pa.Table:
    return build_prompts(many(6), tokenizer, DATA, [STOP])


def draw(number: int, index: int, epoch: int = 0) -> Draw:
    return Draw(table="student_text", number=number, epoch=epoch, index=index)


def answer(*tokens: int) -> Completion:
    return Completion(
        response_tokens=list(tokens),
        logprobs=[-0.5] * len(tokens),
        policy_versions=[(0, 3)],
        finish_reason="stop",
    )


def test_requests_are_seeded_by_run_draw_and_sample(table):
    prompts = PromptTable(table, samples_per_prompt=3, max_new_tokens=8, seed=1)
    requests = prompts.requests([draw(4, 2), draw(5, 0)])
    assert [list(r.prompt_tokens) for r in requests] == [
        table["prompt_tokens"][index].as_py() for index in (2, 2, 2, 0, 0, 0)
    ]
    seeds = [r.seed for r in requests]
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [r.seed for r in prompts.requests([draw(4, 2), draw(5, 0)])]
    other = PromptTable(table, samples_per_prompt=3, max_new_tokens=8, seed=2)
    assert not set(seeds) & {r.seed for r in other.requests([draw(4, 2), draw(5, 0)])}
    assert {r.max_new_tokens for r in requests} == {8}


def test_seeds_are_the_same_on_every_machine():
    assert sample_seed(0, Draw(table="student_text", number=0, epoch=0, index=5), 0) == 1207311565


def test_groups_are_one_batch_per_draw(table):
    prompts = PromptTable(table, samples_per_prompt=2, max_new_tokens=8, seed=1)
    draws = [draw(4, 2), draw(5, 0)]
    first, second = prompts.groups(draws, [answer(1), answer(2, 3), answer(4), answer(5, 6, 7)])
    validate(first)
    assert first["trajectory_id"].to_pylist() == ["student_text-0-4/0", "student_text-0-4/1"]
    assert set(second["group_id"].to_pylist()) == {"student_text-0-5"}
    assert second["response_tokens"].to_pylist() == [[4], [5, 6, 7]]
    assert first["prompt_tokens"].to_pylist() == [table["prompt_tokens"][2].as_py()] * 2
    assert first["prompt_index"].to_pylist() == [2, 2]
    assert first["policy_versions"][0].as_py() == [{"start": 0, "version": 3}]
    with pytest.raises(ValueError, match="2 draws need 4 completions, got 3"):
        prompts.groups(draws, [answer(1)] * 3)


def test_the_corpus_rewrites_the_draw_and_nothing_else(table):
    corpus = TextCorpus(corpus_table(reference_corpus(table)))
    source = corpus_table(reference_corpus(table))
    (row,) = corpus.rows([Draw(table="teacher_text", number=9, epoch=1, index=3)])
    validate(row)
    assert row.num_rows == 1
    assert row["trajectory_id"][0].as_py() == "teacher_text-1-9/0"
    assert row["draw_id"][0].as_py() == row["group_id"][0].as_py() == "teacher_text-1-9"
    for name in ("source", "prompt_index", "prompt_tokens", "response_tokens", "loss_mask"):
        assert row[name][0] == source[name][3]
    assert row.get_total_buffer_size() < source.get_total_buffer_size() / 2  # no slice of the whole


def test_a_corpus_has_no_payload(table):
    batch = trajectory_batch(reference_corpus(table)[:1])
    states = np.zeros((len(batch["response_tokens"][0]), 4), np.uint16)
    scored = pa.Table.from_batches([with_teacher_hidden(batch, [states])])
    with pytest.raises(
        SchemaError, match=r"^column teacher_hidden must be absent from a text corpus, which has no payload$"
    ):
        TextCorpus(scored)


def test_references_of_training_rows_only(tokenizer):
    rows = [*many(4), example("u:none", row=4)]
    table = build_prompts(rows, tokenizer, DATA, [STOP])
    training = training_rows(table).to_pylist()
    corpus = reference_corpus(table)
    assert [row.prompt_index for row in corpus] == [
        i for i, row in enumerate(training) if row["reference_text"]
    ]
    assert all(row.source == "reference" and row.behavior_logprobs is None for row in corpus)
    for row in corpus:
        assert row.prompt_tokens == table["prompt_tokens"][row.prompt_index].as_py()
        assert row.response_tokens == table["reference_tokens"][row.prompt_index].as_py()
    nothing = build_prompts([example("u:a"), example("u:b", row=1)], tokenizer, DATA, [STOP])
    with pytest.raises(ConfigError, match=r"data.path must have references"):
        reference_corpus(nothing)


# Parquet


def test_parquet_round_trip(table, tmp_path):
    write_table(table, tmp_path / "deep" / "prompts.parquet")
    read = read_table(tmp_path / "deep" / "prompts.parquet")
    assert read.equals(table, check_metadata=True)
    prompts = PromptTable.read(
        tmp_path / "deep" / "prompts.parquet", samples_per_prompt=1, max_new_tokens=2, seed=0
    )
    assert prompts.num_rows == 6
    corpus = corpus_table(reference_corpus(table))
    write_table(corpus, str(tmp_path / "corpus.parquet"))
    assert TextCorpus.read(tmp_path / "corpus.parquet").rows([draw(0, 1)]) == TextCorpus(corpus).rows(
        [draw(0, 1)]
    )
    write_table(corpus_table([]), tmp_path / "empty.parquet")
    assert TextCorpus.read(tmp_path / "empty.parquet").num_rows == 0


def test_a_write_that_fails_leaves_the_old_file(table, tmp_path, monkeypatch):
    path = tmp_path / "prompts.parquet"
    write_table(table, path)

    def fail_half_way(_, temporary, **settings):
        Path(temporary).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(distill_data.tables.pq, "write_table", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        write_table(table.slice(0, 1), path)
    assert read_table(path).equals(table)
    assert [child.name for child in tmp_path.iterdir()] == ["prompts.parquet"]
