"""Table rows as requests and trajectory rows, and the tables on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distill import data as distill_data
from distill.data import (
    PromptTable,
    TextCorpus,
    build_prompts,
    corpus_table,
    read_table,
    reference_corpus,
    sample_seed,
    training_rows,
    write_table,
)
from distill.errors import ConfigError
from distill.interfaces import Completion, Draw
from distill.schema import SchemaError, trajectory_batch, validate, with_teacher_hidden
from tests.unit.data.builders import DATA, STOP, example, many


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


def test_a_response_becomes_a_row_of_its_draw(table):
    prompts = PromptTable(table, samples_per_prompt=2, max_new_tokens=8, seed=1)
    row = prompts.row(draw(4, 2), 1, answer(5, 6, 7))
    validate(row)
    assert row["trajectory_id"].to_pylist() == ["student_text-0-4/1"]
    assert row["group_id"].to_pylist() == ["student_text-0-4"]
    assert row["response_tokens"].to_pylist() == [[5, 6, 7]]
    assert row["prompt_tokens"].to_pylist() == [table["prompt_tokens"][2].as_py()]
    assert row["prompt_index"].to_pylist() == [2]
    assert row["policy_versions"][0].as_py() == [{"start": 0, "version": 3}]


def test_corpus_rows_get_the_ids_of_their_draw_and_change_in_nothing_else(table):
    corpus = TextCorpus(corpus_table(reference_corpus(table)))
    source = corpus_table(reference_corpus(table))
    row = corpus.row(Draw(table="teacher_text", number=9, epoch=1, index=3))
    validate(row)
    assert row.num_rows == 1
    assert row["trajectory_id"][0].as_py() == "teacher_text-1-9/0"
    assert row["draw_id"][0].as_py() == row["group_id"][0].as_py() == "teacher_text-1-9"
    for name in ("source", "prompt_index", "prompt_tokens", "response_tokens", "loss_mask"):
        assert row[name][0] == source[name][3]
    assert row.get_total_buffer_size() < source.get_total_buffer_size() / 2  # not a slice of the whole


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
    assert TextCorpus.read(tmp_path / "corpus.parquet").row(draw(0, 1)) == TextCorpus(corpus).row(draw(0, 1))
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
