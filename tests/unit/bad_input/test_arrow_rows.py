"""Rows between actors and learner: a row that is not as the schema says is refused with its column and row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distill.schema import (
    SchemaError,
    Trajectory,
    trajectory_batch,
    trajectory_schema,
    validate,
    with_teacher_hidden,
)
from tests.unit.bad_input.outcome import cases, outcome_of

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)


@st.composite
def trajectories(draw: st.DrawFn) -> list[Trajectory]:
    rows = []
    for number in range(draw(st.integers(1, 3))):
        response = draw(TOKENS)
        student = draw(st.booleans())
        rows.append(
            Trajectory(
                draw_id=f"d{number}", source="student" if student else "reference", prompt_index=draw(st.integers(0, 9)),
                sample_index=number, prompt_tokens=draw(TOKENS), response_tokens=response,
                loss_mask=draw(st.none() | st.just([True] * len(response))),
                behavior_logprobs=[-1.0] * len(response) if student else None,
                policy_versions=[(0, 3)] if student else None, finish_reason="stop" if student else None,
            )
        )  # fmt: skip
    return rows


@cases(80)
@given(trajectories())
def test_a_good_row_comes_back_as_it_was(rows: list[Trajectory]):
    batch = trajectory_batch(rows)
    for row, found in zip(rows, batch.to_pylist(), strict=True):
        assert (found["prompt_tokens"], found["response_tokens"]) == (row.prompt_tokens, row.response_tokens)
        assert found["loss_mask"] == row.loss_mask and found["source"] == row.source


BAD_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "trajectory_id": st.none(),
    "draw_id": st.none(),
    "group_id": st.none(),
    "source": st.none() | st.text(max_size=4),
    "prompt_index": st.none() | st.integers(-(2**40), -1),
    "sample_index": st.none() | st.integers(-(2**31), -1),
    "prompt_tokens": st.none() | st.just([]) | st.just([1, None]) | st.lists(st.integers(-9, -1), min_size=1, max_size=2),
    "response_tokens": st.none() | st.just([]) | st.just([None]) | st.lists(st.integers(-9, -1), min_size=1, max_size=2),
    "loss_mask": st.just([]) | st.just([True] * 9) | st.just([None]),
    "behavior_logprobs": st.just([]) | st.just([-1.0] * 9) | st.just([None]),
    "policy_versions": st.sampled_from(
        [[], [None], [{"start": None, "version": 1}], [{"start": 0, "version": None}], [{"start": 1, "version": 1}],
         [{"start": 0, "version": 2}, {"start": 1, "version": 1}], [{"start": 0, "version": 1}, {"start": 99, "version": 2}]]
    ),
    "finish_reason": st.text(max_size=3),
}  # fmt: skip


@cases(150)
@given(trajectories(), st.sampled_from(sorted(BAD_VALUES)), st.data())
def test_a_bad_value_is_refused_with_its_column(rows: list[Trajectory], name: str, data: st.DataObject):
    batch = trajectory_batch(rows)
    place = data.draw(st.integers(0, len(rows) - 1))
    values = batch.column(name).to_pylist()
    values[place] = data.draw(BAD_VALUES[name])
    assume(values[place] not in ("student", "teacher", "reference", "stop", "length"))
    field = batch.schema.field(name)
    broken = batch.set_column(batch.schema.get_field_index(name), field, pa.array(values, field.type))
    error = outcome_of(lambda: validate(broken)).error
    assert isinstance(error, SchemaError) and ("column" in error.name)
    if name not in ("response_tokens",):  # whose length is the rule for others
        assert name in error.name and f"row {place}" in str(error)


TYPES = [
    pa.int8(),
    pa.string(),
    pa.binary(),
    pa.list_(pa.int64()),
    pa.null(),
    pa.float64(),
    pa.list_(pa.list_(pa.int32())),
]


@cases(100)
@given(trajectories(), st.sampled_from(trajectory_schema(4).names), st.sampled_from(TYPES), st.booleans())
def test_another_type_a_missing_column_and_one_too_many(
    rows: list[Trajectory], name: str, kind: pa.DataType, keep: bool
):
    batch = trajectory_batch(rows)
    nulls = pa.nulls(len(rows), kind)
    if name not in batch.schema.names:  # the payload
        changed = batch.append_column(name, nulls)
    elif keep:
        assume(batch.schema.field(name).type != kind)
        changed = batch.set_column(batch.schema.get_field_index(name), pa.field(name, kind), nulls)
    else:
        changed = batch.drop_columns([name])
    error = outcome_of(lambda: validate(changed)).error
    assert isinstance(error, SchemaError) and error.name == f"column {name}"
    twice = pa.RecordBatch.from_arrays(
        [*batch.columns, batch.column(0)], names=[*batch.schema.names, batch.schema.names[0]]
    )
    assert isinstance(
        outcome_of(lambda: validate(twice.replace_schema_metadata(batch.schema.metadata))).error, SchemaError
    )
    assert isinstance(outcome_of(lambda: validate(batch.append_column("odd", nulls))).error, SchemaError)


@cases(40)
@given(trajectories(), st.integers(-2, 2).filter(bool))
def test_a_payload_of_another_length(rows: list[Trajectory], more: int):
    batch = trajectory_batch(rows)
    hidden = [np.zeros((len(row.response_tokens), 4), np.uint16) for row in rows]
    validate(with_teacher_hidden(batch, hidden))
    hidden[-1] = np.zeros((max(0, len(hidden[-1]) + more), 4), np.uint16)
    error = outcome_of(lambda: with_teacher_hidden(batch, hidden)).error
    assert isinstance(error, SchemaError) and error.name == "column teacher_hidden"


@pytest.mark.parametrize("version", [b"", b"2", b"\xff", b"1.0"])
def test_another_version(version: bytes):
    batch = trajectory_batch([Trajectory(draw_id="d", source="reference", prompt_index=0, sample_index=0, prompt_tokens=[1], response_tokens=[2])])  # fmt: skip
    other = batch.replace_schema_metadata({b"distill.schema_version": version})
    error = outcome_of(lambda: validate(other)).error
    assert isinstance(error, SchemaError) and error.name == "schema version"


@pytest.mark.parametrize("name", ["prompt_tokens", "response_tokens"])
def test_a_negative_token_id_is_refused(name: str):
    tokens = {"prompt_tokens": [1], "response_tokens": [2]} | {name: [3, -1]}
    with pytest.raises(SchemaError, match=rf"column {name}=-1 in row 0 must have token ids >= 0"):
        trajectory_batch(
            [Trajectory(draw_id="d", source="reference", prompt_index=0, sample_index=0, **tokens)]
        )


def test_a_row_that_is_there_twice():
    row = Trajectory(
        draw_id="d",
        source="reference",
        prompt_index=0,
        sample_index=0,
        prompt_tokens=[1],
        response_tokens=[2],
    )
    with pytest.raises(SchemaError, match=r"column trajectory_id='d/0' again in row 1 must be unique"):
        trajectory_batch([row, row])
