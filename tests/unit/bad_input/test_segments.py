"""Segment files: a reader gets the very row that its reference names, or an error that says what is there."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.interfaces import Draw, SampleRef, SegmentMissing
from distill.replay.locations import ForeignLocation
from distill.replay.segments import SegmentStore
from distill.schema import Trajectory, trajectory_batch, with_teacher_hidden
from tests.unit.bad_input.outcome import cases, outcome_of

_folders = itertools.count()


def draw(number: int) -> Draw:
    return Draw(table="student_text", number=number, epoch=0, index=number)


def row(number: int) -> pa.RecordBatch:
    length = 3 + number
    made = Trajectory(
        draw_id=draw(number).draw_id, source="student", prompt_index=number, sample_index=0, prompt_tokens=[7] * 53,
        response_tokens=list(range(length)), behavior_logprobs=[-1.0] * length, policy_versions=[(0, 1)], finish_reason="stop",
    )  # fmt: skip
    return with_teacher_hidden(trajectory_batch([made]), [np.full((length, 8), number, np.uint16)])


def written(folder: Path) -> tuple[SegmentStore, list[SampleRef], Path]:
    """A store with three rows in one file, which no reader has opened yet."""
    place = folder / str(next(_folders))
    store = SegmentStore(place / "memory", place / "spill", "w", "n", 1 << 20, 1 << 20)
    refs = [store.append(draw(number), 0, row(number)) for number in range(3)]
    (file,) = (place / "memory").glob("*.arrow")
    return store, refs, file


PLACES = st.integers(-10, 4000)


@cases(150)
@given(st.sampled_from(range(3)), PLACES, PLACES)
def test_any_place_in_a_file(tmp_path: Path, number: int, offset: int, num_bytes: int):
    """A wrong place is no row, another row, or behind the end."""
    store, refs, _ = written(tmp_path)
    wrong = dataclasses.replace(
        refs[number], location=dataclasses.replace(refs[number].location, offset=offset, num_bytes=num_bytes)
    )
    outcome = outcome_of(lambda: store.read(wrong))
    if outcome.accepted is not None:
        assert outcome.accepted.equals(row_as_written(store, refs[number])), (
            "a longer slice of the same place"
        )
    else:
        assert isinstance(outcome.error, SegmentMissing | ForeignLocation)


@cases(100)
@given(st.integers(0, 5000), st.sampled_from(range(3)))
def test_a_file_that_was_cut(tmp_path: Path, size: int, number: int):
    store, refs, file = written(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: size % len(content)])
    outcome = outcome_of(lambda: store.read(refs[number]))
    if outcome.accepted is not None:
        assert size % len(content) >= refs[number].location.offset + refs[number].location.num_bytes
        assert (
            outcome.accepted.column("response_tokens").to_pylist()
            == row(number).column("response_tokens").to_pylist()
        )
    else:
        assert isinstance(outcome.error, SegmentMissing)


@cases(150)
@given(st.integers(0, 5000), st.binary(min_size=1, max_size=8), st.sampled_from(range(3)))
def test_bytes_that_changed(tmp_path: Path, at: int, by: bytes, number: int):
    """Nothing ends the process, and what is read has the name of its row and values of the right length."""
    store, refs, file = written(tmp_path)
    content = bytearray(file.read_bytes())
    at %= len(content)
    content[at : at + len(by)] = by[: len(content) - at]
    file.write_bytes(content)
    outcome = outcome_of(lambda: store.read(refs[number]))
    if outcome.accepted is not None:
        found = outcome.accepted.to_pylist()[0]
        assert found["trajectory_id"] == refs[number].location.trajectory_id
    else:
        assert isinstance(outcome.error, SegmentMissing)


@pytest.mark.parametrize("end", [1 << 30, -1, 54])
def test_a_list_that_ends_behind_the_file_is_no_row(tmp_path: Path, end: int):
    """Arrow would read from other memory, or end the process."""
    store, refs, file = written(tmp_path)
    offsets = np.array([0, 53], np.int32).tobytes()  # of the prompt's tokens
    before, found, after = file.read_bytes().rpartition(offsets)
    assert found, "of the last row, because the numbers of its message come first"
    file.write_bytes(before + np.array([0, end], np.int32).tobytes() + after)
    error = outcome_of(lambda: store.read(refs[2])).error
    assert isinstance(error, SegmentMissing) and "the bytes there are no row" in error.must


@cases(60)
@given(st.binary(max_size=300))
def test_a_file_of_any_bytes(tmp_path: Path, content: bytes):
    store, refs, file = written(tmp_path)
    file.write_bytes(content)
    assert isinstance(outcome_of(lambda: store.read(refs[0])).error, SegmentMissing)
