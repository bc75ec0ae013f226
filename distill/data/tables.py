"""Turns table rows into the requests and trajectory rows of the loops, and keeps tables on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from distill.data.prompts import training_rows
from distill.errors import NO_VALUE, ConfigError, first_line
from distill.files import replacing_file
from distill.interfaces import Completion, Draw, SampleRequest, Table
from distill.schema import SchemaError, Trajectory, trajectory_batch, trajectory_schema, validate


class PromptTable:
    """The prompt table as :class:`distill.interfaces.Prompts`."""

    def __init__(
        self, table: pa.Table, *, samples_per_prompt: int, max_new_tokens: int, seed: int | None
    ) -> None:
        self._prompts = table["prompt_tokens"].combine_chunks()
        self.samples_per_prompt = samples_per_prompt
        self._max_new_tokens = max_new_tokens
        self._seed = seed

    @classmethod
    def read(
        cls, path: str | Path, *, samples_per_prompt: int, max_new_tokens: int, seed: int | None
    ) -> Self:
        """Read the Parquet file of a prompt table."""
        table = read_table(path)
        return cls(table, samples_per_prompt=samples_per_prompt, max_new_tokens=max_new_tokens, seed=seed)

    @property
    def num_rows(self) -> int:
        return len(self._prompts)

    def requests(self, draws: Sequence[Draw]) -> list[SampleRequest]:
        """Return ``samples_per_prompt`` requests per draw, in draw order, seeded by (run, draw, sample) if there is a seed."""
        return [
            SampleRequest(
                prompt_tokens=prompt_tokens,
                max_new_tokens=self._max_new_tokens,
                seed=None if self._seed is None else sample_seed(self._seed, draw, sample),
            )
            for draw in draws
            for prompt_tokens in [self._prompts[draw.index].values.to_numpy()]
            for sample in range(self.samples_per_prompt)
        ]

    def row(self, draw: Draw, sample: int, completion: Completion) -> pa.RecordBatch:
        """Build the validated row of one response to :meth:`requests`."""
        return trajectory_batch(
            [
                Trajectory(
                    draw_id=draw.draw_id,
                    source="student",
                    prompt_index=draw.index,
                    sample_index=sample,
                    prompt_tokens=self._prompts[draw.index].values.to_numpy(),
                    response_tokens=completion.response_tokens,
                    behavior_logprobs=completion.logprobs,
                    policy_versions=completion.policy_versions,
                    finish_reason=completion.finish_reason,
                    generated_at=datetime.now(UTC),
                )
            ]
        )


_NAME_IN_SEED: Mapping[Table, str] = {"student_text": "student", "teacher_text": "text", "heldout": "heldout"}
"""Part of every seed. These names never change, because committed results could not be repeated with others."""


def sample_seed(run_seed: int, draw: Draw, sample: int) -> int:
    """Return the seed of one response: the same on every machine, in the 31 bits that engines accept."""
    name = f"{run_seed}/{_NAME_IN_SEED[draw.table]}-{draw.epoch}-{draw.number}/{sample}"
    return xxhash.xxh3_64_intdigest(name.encode()) & 0x7FFFFFFF


class TextCorpus:
    """A table of trajectory rows as :class:`distill.interfaces.Corpus`."""

    def __init__(self, table: pa.Table) -> None:
        """Raises: SchemaError when the rows are not trajectory rows without payload."""
        batches = table.combine_chunks().to_batches()
        self._rows = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
        _validate_corpus(self._rows)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the Parquet file of a corpus."""
        return cls(read_table(path))

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def row(self, draw: Draw) -> pa.RecordBatch:
        """Return the batch of one row that a draw selects. It is a group of its own, so its sample number is 0."""
        row = self._rows.take(pa.array([draw.index]))  # a copy: a slice would keep the whole corpus
        filled = {
            "trajectory_id": pa.array([f"{draw.draw_id}/0"]),
            "draw_id": pa.array([draw.draw_id]),
            "group_id": pa.array([draw.draw_id]),
            "sample_index": pa.array([0], pa.int32()),
            # Of the teacher that sampled the text: losses compare with the student's own behaviour only.
            "behavior_logprobs": pa.nulls(1, row.schema.field("behavior_logprobs").type),
        }
        arrays = [filled.get(name, row.column(name)) for name in row.schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=row.schema)


def reference_corpus(table: pa.Table) -> list[Trajectory]:
    """Return the references of a prompt table's training rows as trajectory rows, in table order.

    Raises: ConfigError when no training row has a reference.
    """
    rows = [
        Trajectory(
            draw_id=f"reference-{index}",
            source="reference",
            prompt_index=index,
            sample_index=0,
            prompt_tokens=row["prompt_tokens"],
            response_tokens=row["reference_tokens"],
            loss_mask=row["reference_mask"],
        )
        for index, row in enumerate(_rows_of(training_rows(table)))
        if row["reference_tokens"] is not None
    ]
    if not rows:
        raise ConfigError(
            "data.path",
            NO_VALUE,
            "have references, which this recipe or sft.enabled=true needs",
            "add completions, or set recipe.teacher_text=sampled and sft.enabled=false",
        )
    return rows


def corpus_table(rows: Sequence[Trajectory]) -> pa.Table:
    """Build the table that :class:`TextCorpus` reads from trajectory rows."""
    return pa.Table.from_batches([trajectory_batch(rows)])


def _rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    wanted = table.select(["prompt_tokens", "reference_tokens", "reference_mask"])
    for batch in wanted.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _validate_corpus(batch: pa.RecordBatch) -> None:
    validate(batch)
    extra = set(batch.schema.names) - set(trajectory_schema().names)
    if extra:
        raise SchemaError(
            f"column {min(extra)}", NO_VALUE, "be absent from a text corpus, which has no payload"
        )


# Parquet


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write a Parquet file atomically."""
    with replacing_file(Path(path)) as temporary:
        pq.write_table(
            table,
            temporary,
            use_compliant_nested_type=False,  # lists read back as written
            write_page_checksum=True,  # a changed token would otherwise be trained on
        )


def read_table(path: str | Path) -> pa.Table:
    """Read a table that :func:`write_table` wrote, including its schema metadata.

    Raises: ConfigError when the file is damaged; FileNotFoundError.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        must = f"be a Parquet file ({first_line(error)})"
        remedy = "bring it back from a copy, or remove it to have it made again"
        raise ConfigError("table", path, must, remedy) from None
    return table
