"""The Arrow schema of a trajectory row: the one contract between actors and learner.

A row is one prompt and one response. Rollout actors fill all columns except the teacher's
payload, the teacher actor fills the payload, and the learner reads both. A *group* consists of all
rows of one draw and is always one record batch. Rows are built once, by :func:`trajectory_batch`,
and are stored as Arrow; engines and tokenizers receive lists of tokens read from the batches.

Rows of teacher text (samples of the teacher, or references) have the same schema. Their columns
for a behaviour policy are null.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from distill.errors import NO_VALUE, DistillError
from distill.interfaces import Tokens

SCHEMA_VERSION = "1"
"""Written to the schema's metadata; a reader rejects any other version."""

SOURCES = ("student", "teacher", "reference")
FINISH_REASONS = ("stop", "length")

POLICY_SPAN = pa.struct([("start", pa.int32()), ("version", pa.int64())])


class SchemaError(DistillError, ValueError):
    """A batch that breaks the contract: the column, its value and row, and the rule."""

    code = "schema"


def hidden_type(hidden_size: int) -> pa.DataType:
    """Type of one row's hidden payload: T states of ``hidden_size`` bf16 numbers, stored as uint16.

    Arrow has no bf16, so the bits are stored as uint16 and the learner views them as bf16. The
    outer list has 64-bit offsets because a column exceeds 2**31 numbers at about 3.7 M tokens of
    width 576.
    """
    return pa.large_list(pa.list_(pa.uint16(), hidden_size))


@functools.cache
def trajectory_schema(hidden_size: int | None = None) -> pa.Schema:
    """The schema of a trajectory batch.

    ``hidden_size``: width of the teacher's hidden states; None for rows that no teacher has scored,
    which have no payload column.
    """
    fields = [
        # "<draw_id>/<sample>", unique in a run. Never null.
        pa.field("trajectory_id", pa.string(), nullable=False),
        # The draw (table, epoch, number) that the row belongs to. Never null.
        pa.field("draw_id", pa.string(), nullable=False),
        # Shared by all rows of one draw: the unit of leasing, age and eviction. Never null.
        pa.field("group_id", pa.string(), nullable=False),
        # Who wrote the response: student | teacher | reference. Never null.
        pa.field("source", pa.string(), nullable=False),
        # Row of the prompt table that the prompt comes from. Never null.
        pa.field("prompt_index", pa.int64(), nullable=False),
        # Number of the sample within the group, from 0. Never null.
        pa.field("sample_index", pa.int32(), nullable=False),
        # Token ids of the prompt, chat template applied. At least one. Never null.
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        # Token ids a_1..a_T of the response, the stop token included. T >= 1. Never null.
        pa.field("response_tokens", pa.list_(pa.int32()), nullable=False),
        # Per response token: whether the loss counts it. Null: all count (false only for the
        # user's turns inside a reference of several turns).
        pa.field("loss_mask", pa.list_(pa.bool_())),
        # Per response token: log-probability in nats under the policy that sampled it, at
        # temperature 1. Filled by the rollout actor, and in the file of a sampled corpus; null in rows of
        # teacher text that come from a draw.
        pa.field("behavior_logprobs", pa.list_(pa.float32())),
        # Which weights sampled which tokens: spans by first token, versions ascending.
        # Filled by the rollout actor; null for teacher text.
        pa.field("policy_versions", pa.list_(POLICY_SPAN)),
        # stop: a stop token ended the response; length: the limit cut it. Null for references.
        pa.field("finish_reason", pa.string()),
        # When the response was complete (UTC). Null for teacher text.
        pa.field("generated_at", pa.timestamp("us", tz="UTC")),
        # When the teacher's payload was filled (UTC). Null until scored.
        pa.field("scored_at", pa.timestamp("us", tz="UTC")),
    ]
    if hidden_size is not None:
        # Row t: the teacher's final-norm hidden state before response token t, bf16 bits.
        # T rows. Filled by the teacher actor; null until scored.
        fields.append(pa.field("teacher_hidden", hidden_type(hidden_size)))
    return pa.schema(fields, metadata={"distill.schema_version": SCHEMA_VERSION})


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One row before it becomes Arrow, with the values of a generator or a data set."""

    draw_id: str
    source: str
    prompt_index: int
    sample_index: int
    prompt_tokens: Tokens
    response_tokens: Tokens
    loss_mask: Sequence[bool] | None = None
    behavior_logprobs: Sequence[float] | None = None
    policy_versions: Sequence[tuple[int, int]] | None = None
    """(first token, version) of each span."""
    finish_reason: str | None = None
    generated_at: datetime | None = None


def trajectory_batch(rows: Sequence[Trajectory]) -> pa.RecordBatch:
    """Build the batch of one group, or of a whole corpus, without payload.

    Raises: SchemaError (see :func:`validate`).
    """
    columns: dict[str, Any] = {
        "trajectory_id": [f"{row.draw_id}/{row.sample_index}" for row in rows],
        "draw_id": [row.draw_id for row in rows],
        "group_id": [row.draw_id for row in rows],
        "source": [row.source for row in rows],
        "prompt_index": [row.prompt_index for row in rows],
        "sample_index": [row.sample_index for row in rows],
        "prompt_tokens": _lists([row.prompt_tokens for row in rows], np.int32),
        "response_tokens": _lists([row.response_tokens for row in rows], np.int32),
        "loss_mask": [row.loss_mask for row in rows],
        "behavior_logprobs": _lists([row.behavior_logprobs for row in rows], np.float32),
        "policy_versions": [
            None
            if row.policy_versions is None
            else [{"start": start, "version": version} for start, version in row.policy_versions]
            for row in rows
        ],
        "finish_reason": [row.finish_reason for row in rows],
        "generated_at": [row.generated_at for row in rows],
        "scored_at": [None] * len(rows),
    }
    schema = trajectory_schema()
    arrays = [
        column if isinstance(column := columns[field.name], pa.Array) else pa.array(column, field.type)
        for field in schema
    ]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    validate(batch)
    return batch


def _lists(rows: Sequence[Any], dtype: type) -> pa.Array | Sequence[Any]:
    """The rows as one list array, built without looking at each number; rows with a null stay as they are."""
    if not rows or any(row is None for row in rows):
        return rows
    arrays = [np.asarray(row, dtype) for row in rows]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def with_teacher_hidden(batch: pa.RecordBatch, hidden: Sequence[np.ndarray]) -> pa.RecordBatch:
    """Return the batch with its hidden payload.

    ``hidden``: one uint16 array [T, D] (bf16 bits) per row, in row order.

    Raises: SchemaError when the numbers of states and response tokens of a row differ.
    """
    width = hidden[0].shape[1]
    lengths = np.fromiter((states.shape[0] for states in hidden), np.int64, len(hidden))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    parts = [np.ascontiguousarray(states).reshape(-1) for states in hidden]
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts)  # one row is wrapped, not copied
    values = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.uint16()), width)
    column = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
    stamp = pa.array([datetime.now(UTC)] * batch.num_rows, pa.timestamp("us", tz="UTC"))
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    columns |= {"scored_at": stamp, "teacher_hidden": column}
    schema = trajectory_schema(width)
    scored = pa.RecordBatch.from_arrays([columns[field.name] for field in schema], schema=schema)
    _check_aligned(scored, "teacher_hidden")  # the other columns were checked when the batch was built
    return scored


def hidden_rows(batch: pa.RecordBatch) -> list[np.ndarray]:
    """Return the hidden payload of each row as a uint16 array [T, D], without copying."""
    column = batch.column("teacher_hidden")
    width = column.type.value_type.list_size
    values = column.values.values.to_numpy(zero_copy_only=True).reshape(-1, width)
    offsets = column.offsets.to_numpy()
    return [values[start:end] for start, end in itertools.pairwise(offsets)]


def tokens_of(row: pa.RecordBatch, column: str) -> np.ndarray:
    """Return the tokens of a batch of one row as an int32 array, without copying."""
    return row.column(column)[0].values.to_numpy()


def oldest_version(batch: pa.RecordBatch) -> int | None:
    """Return the oldest policy version that sampled any token of the batch; None for teacher text."""
    spans = batch.column("policy_versions")
    if spans.null_count == len(spans):
        return None
    return int(min(span["version"] for row in spans.to_pylist() if row for span in row))


def validate(batch: pa.RecordBatch) -> None:
    """Check a batch against the contract.

    Raises: SchemaError with the column, the value, its row and the rule.
    """
    _check_types(batch, trajectory_schema(hidden_width(batch.schema)))
    for name in ("prompt_tokens", "response_tokens", "loss_mask", "behavior_logprobs"):
        _check_no_null_inside(batch, name)
    for name in ("prompt_tokens", "response_tokens"):
        _check_token_ids(batch, name)
    _check_names(batch)
    _check_values(batch, "source", SOURCES)
    _check_values(batch, "finish_reason", FINISH_REASONS)
    _check_not_empty(batch, "prompt_tokens")
    _check_not_empty(batch, "response_tokens")
    for name in ("loss_mask", "behavior_logprobs", "teacher_hidden"):
        if name in batch.schema.names:
            _check_aligned(batch, name)
    _check_spans(batch)
    _check_student_rows(batch)


def hidden_width(schema: pa.Schema) -> int | None:
    """The width of the payload; None without one. Raises: SchemaError when its type is another one."""
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise SchemaError(f"column {name}", f"{names.count(name)} columns", "exist once")
    if "teacher_hidden" not in names:
        return None
    got = schema.field("teacher_hidden").type
    is_known = pa.types.is_large_list(got) and pa.types.is_fixed_size_list(got.value_type)
    if not is_known or got != hidden_type(got.value_type.list_size):
        raise SchemaError("column teacher_hidden", got, "be large_list<fixed_size_list<uint16>[width]>")
    return got.value_type.list_size


def _check_types(batch: pa.RecordBatch, expected: pa.Schema) -> None:
    got_version = (
        (batch.schema.metadata or {}).get(b"distill.schema_version", b"none").decode(errors="replace")
    )
    if got_version != SCHEMA_VERSION:
        raise SchemaError(
            "schema version", got_version, f"be {SCHEMA_VERSION}", "read it with the version that wrote it"
        )
    for field in expected:
        if field.name not in batch.schema.names:
            raise SchemaError(f"column {field.name}", "none", f"exist with type {field.type}")
        got = batch.schema.field(field.name).type
        if got != field.type:
            raise SchemaError(f"column {field.name}", got, f"be {field.type}")
        column = batch.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise SchemaError(f"column {field.name}", f"null in row {row}", "have a value in every row")
    for name in batch.schema.names:
        if name not in expected.names:
            raise SchemaError(f"column {name}", NO_VALUE, "be a column of the schema")


def _check_values(batch: pa.RecordBatch, name: str, allowed: tuple[str, ...]) -> None:
    for row, value in enumerate(batch.column(name).to_pylist()):
        if value is not None and value not in allowed:
            raise SchemaError(f"column {name}", f"{value!r} in row {row}", f"be one of {allowed}")


def _lengths(column: pa.Array) -> list[int | None]:
    return column.value_lengths().to_pylist()


def _check_not_empty(batch: pa.RecordBatch, name: str) -> None:
    for row, length in enumerate(_lengths(batch.column(name))):
        if not length:
            raise SchemaError(f"column {name}", f"0 tokens in row {row}", "have at least 1 token")


def _check_aligned(batch: pa.RecordBatch, name: str) -> None:
    responses = _lengths(batch.column("response_tokens"))
    for row, (length, got) in enumerate(zip(responses, _lengths(batch.column(name)), strict=True)):
        if got is not None and got != length:
            raise SchemaError(
                f"column {name}",
                f"{got} values in row {row}",
                f"have {length} values, one per response token",
            )


def _check_no_null_inside(batch: pa.RecordBatch, name: str) -> None:
    """A null token would be read as an arbitrary number, because readers look at the values alone."""
    if batch.column(name).flatten().null_count:
        row = next(
            row for row, values in enumerate(batch.column(name).to_pylist()) if values and None in values
        )
        raise SchemaError(
            f"column {name}", f"a null among the values of row {row}", "have a value for every token"
        )


def _check_token_ids(batch: pa.RecordBatch, name: str) -> None:
    values = batch.column(name).flatten().to_numpy()
    if values.size and values.min() < 0:
        row = next(row for row, ids in enumerate(batch.column(name).to_pylist()) if min(ids) < 0)
        raise SchemaError(f"column {name}", f"{values.min()} in row {row}", "have token ids >= 0")


def _check_names(batch: pa.RecordBatch) -> None:
    for name in ("prompt_index", "sample_index"):
        for row, value in enumerate(batch.column(name).to_pylist()):
            if value < 0:
                raise SchemaError(f"column {name}", f"{value} in row {row}", "be >= 0")
    names = batch.column("trajectory_id").to_pylist()
    if len(set(names)) != len(names):
        row = next(row for row, name in enumerate(names) if name in names[:row])
        raise SchemaError("column trajectory_id", f"{names[row]!r} again in row {row}", "be unique")


def _check_spans(batch: pa.RecordBatch) -> None:
    lengths = _lengths(batch.column("response_tokens"))
    for row, spans in enumerate(batch.column("policy_versions").to_pylist()):
        if spans is None:
            continue
        if any(span is None or None in span.values() for span in spans):
            raise SchemaError(
                "column policy_versions", f"a null in row {row}", "have start and version in each span"
            )
        starts = [span["start"] for span in spans]
        versions = [span["version"] for span in spans]
        rising = all(a < b for a, b in itertools.pairwise(starts))
        ordered = all(a < b for a, b in itertools.pairwise(versions))
        length = lengths[row] or 0
        if not spans or starts[0] != 0 or not rising or not ordered or starts[-1] >= length:
            raise SchemaError(
                "column policy_versions",
                f"{list(zip(starts, versions, strict=True))} in row {row}",
                f"be spans from token 0, with starts and versions rising, within {length} tokens",
            )


def _check_student_rows(batch: pa.RecordBatch) -> None:
    for row, source in enumerate(batch.column("source").to_pylist()):
        if source != "student":
            continue
        for name in ("behavior_logprobs", "policy_versions", "finish_reason"):
            if not batch.column(name)[row].is_valid:
                raise SchemaError(f"column {name}", f"null in row {row}", "have a value in every student row")
