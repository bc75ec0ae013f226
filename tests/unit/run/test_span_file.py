"""spans.jsonl: what is written is read, and what is torn, foreign or hostile is skipped and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.replay.spans import NONE, Row, SpanBuffer, SpanKind, SpanOutcome
from distill.run.span_file import Counters, Dropped, Span, SpanFile, SpanReader, Started

START_NS = 1_790_000_000_123_456_789


def row(
    buffer: SpanBuffer, number: int, *, lane: str = "rollout-0.1000", kind: int = SpanKind.ROLLOUT
) -> Row:
    start = START_NS + number * 5_000_000
    return (
        kind,
        buffer.lane(lane),
        0,
        number,
        0,
        1,
        start,
        start + 7_000_999,
        120,
        3,
        NONE,
        SpanOutcome.DONE,
    )


def drained(*numbers: int) -> dict[str, Any]:
    buffer = SpanBuffer()
    for number in numbers:
        buffer.add(row(buffer, number))
    return buffer.drain()


def written(path: Path) -> Path:
    """A file with two starts of the run."""
    first = SpanFile(path, incarnation=1)
    first.write(drained(0, 1))
    first.counters(START_NS, 1, {"policy/age_max": 2.0})
    first.close()
    second = SpanFile(path, incarnation=2)
    second.write(drained(2))
    second.close()
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    reader = SpanReader(written(tmp_path / "spans.jsonl"))
    found = list(reader)
    assert [type(each) for each in found] == [Started, Span, Span, Counters, Started, Span]
    assert [each.incarnation for each in found if isinstance(each, Started)] == [1, 2]
    assert found[1] == Span(
        kind=SpanKind.ROLLOUT,
        lane="rollout-0.1000",
        table="student_text",
        draw=0,
        issue=0,
        sample=1,
        start_us=START_NS // 1000,
        end_us=(START_NS + 7_000_999) // 1000,
        tokens=120,
        version=3,
        update=NONE,
        outcome=SpanOutcome.DONE,
    )
    assert [each.draw for each in found if isinstance(each, Span)] == [0, 1, 2]
    assert found[3] == Counters(START_NS // 1000, 1, {"policy/age_max": 2.0})
    assert (reader.num_broken, reader.foreign) == (0, None)


@pytest.mark.parametrize("cut", range(2, 400, 13))
def test_a_file_that_was_cut_anywhere_is_read_up_to_there_and_continued(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path / "spans.jsonl")
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    whole = data[:-cut].count(b"\n")
    reader = SpanReader(path)
    before = list(reader)
    assert reader.num_broken == (not data[:-cut].endswith(b"\n"))
    third = SpanFile(path, incarnation=3)
    third.write(drained(9))
    third.close()
    after = list(SpanReader(path))
    assert after[: len(before)] == before
    assert [type(each) for each in after[len(before) :]] == [Started, Span]
    assert path.read_bytes().count(b"\n") == whole + reader.num_broken + 2


def test_a_full_file_takes_no_more_and_counts_what_it_refused(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    file = SpanFile(path, incarnation=1, most_bytes=2000)
    for number in range(100):
        file.write(drained(number))
        file.counters(START_NS, number, {"policy/age_max": 1.0})
    file.close()
    assert path.stat().st_size < 2100
    found = list(SpanReader(path))
    num_spans = sum(isinstance(each, Span) for each in found)
    assert 0 < num_spans < 100
    assert found[-1] == Dropped(100 - num_spans)


def test_spans_that_a_buffer_dropped_are_in_the_file(tmp_path: Path) -> None:
    buffer = SpanBuffer(capacity=1)
    for number in range(4):
        buffer.add(row(buffer, number))
    file = SpanFile(tmp_path / "spans.jsonl", incarnation=1)
    file.write(buffer.drain())
    file.write(buffer.drain())
    file.close()
    assert list(SpanReader(tmp_path / "spans.jsonl"))[2:] == [Dropped(3)]


def test_a_part_of_another_version_is_skipped_and_named(tmp_path: Path) -> None:
    path = written(tmp_path / "spans.jsonl")
    newer = path.read_text().replace(
        '{"spans_format":1,"incarnation":1}', '{"spans_format":2,"incarnation":1}'
    )
    path.write_text(newer)
    reader = SpanReader(path)
    assert [type(each) for each in reader] == [Started, Span]
    assert (reader.foreign, reader.num_broken) == ("2", 0)


def _with(spans: dict[str, Any], **line: Any) -> str:
    columns: dict[str, Any] = {
        "kind": 0, "lane": 0, "table": 0, "draw": 1, "issue": 0, "sample": 0, "tokens": 1, "version": 1, "update": -1,
        "outcome": 0, "start_us": [0], "duration_us": [5],
    }  # fmt: skip
    return json.dumps({"base_us": 1, "lanes": ["x"], "dropped": 0, "spans": columns | spans, **line})


@pytest.mark.parametrize(
    "line",
    [
        "null", "3", '"spans"', "[]", "{}", "[" * 100_000, '{"spans": 3, "dropped": 0}',
        '{"spans_format": 1}', '{"counters": {"a": "x"}, "at_us": 1, "update": 1}',
        '{"counters": {"a": NaN}, "at_us": 1, "update": 1}', '{"counters": 3, "at_us": 1, "update": 1}',
        _with({"kind": 99}), _with({"lane": 7}), _with({"lane": -1}), _with({"table": 5}), _with({"outcome": 9}),
        _with({"duration_us": [-1]}), _with({"duration_us": [1, 2]}), _with({"start_us": [1e3]}),
        _with({"start_us": [10**30]}), _with({"draw": "1"}), _with({"draw": True}), _with({}, base_us=None),
        _with({}, lanes=None), _with({"sample": []}),
    ],
)  # fmt: skip
def test_a_line_that_no_run_writes_is_counted_and_yields_nothing(tmp_path: Path, line: str) -> None:
    path = tmp_path / "spans.jsonl"
    path.write_text(line + "\n" + _with({}) + "\n")
    reader = SpanReader(path)
    assert [type(each) for each in reader] == [Span]
    assert reader.num_broken == 1


def test_a_trajectory_takes_fewer_bytes_than_the_documents_say(tmp_path: Path) -> None:
    """docs/trace.md: about 100 bytes of a run folder per trajectory, with updates of 64 trajectories."""
    path = tmp_path / "spans.jsonl"
    file = SpanFile(path, incarnation=1)
    for update in range(50):
        buffer = SpanBuffer()
        for number in range(64 * update, 64 * (update + 1)):
            for kind, lane in ((SpanKind.ROLLOUT, "rollout-0.1000"), (SpanKind.SCORING, "teacher-0.1000")):
                kept = list(row(buffer, number // 4, lane=lane, kind=kind))
                kept[5], kept[6], kept[8] = number % 4, kept[6] + 1_234_567 * (number % 17), 100 + number % 91
                kept[7] = kept[6] + 3_456_789_000 + number * 777_777
                buffer.add(tuple(kept))  # type: ignore[arg-type]
        file.write(buffer.drain())
    file.close()
    assert path.stat().st_size / (64 * 50) < 110
