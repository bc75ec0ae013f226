"""metrics.parquet and events.jsonl."""

from __future__ import annotations

import json
import threading
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.run.metrics import (
    EventLog,
    MetricsWriter,
    name_violations,
    read_events,
    read_metrics,
    reproducible,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# Metrics


def test_columns_are_sorted_with_update_first_and_can_appear_late(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"policy/tv": 0.5, "critic/loss": 1})
    writer.flush()
    writer.write(2, {"rollout/num_tokens": np.float32(7.0), "policy/tv": None})
    writer.close()
    table = read_metrics(tmp_path)
    assert table.column_names == ["update", "critic/loss", "policy/tv", "rollout/num_tokens"]
    assert table.to_pylist() == [
        {"update": 1, "critic/loss": 1.0, "policy/tv": 0.5, "rollout/num_tokens": None},
        {"update": 2, "critic/loss": None, "policy/tv": None, "rollout/num_tokens": 7.0},
    ]
    assert table.schema.field("update").type == pa.int64()


names = st.sampled_from(["policy/a", "policy/b", "critic/c", "timing/d_s"])


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(st.dictionaries(names, st.floats(width=32)), st.booleans()), max_size=8))
def test_rows_are_read_back_regardless_of_flushes(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("run")
    writer = MetricsWriter(folder)
    for update, (values, flush) in enumerate(rows, start=1):
        writer.write(update, values)
        if flush:
            writer.flush()
    writer.close()
    found = read_metrics(folder).to_pylist()
    assert [row["update"] for row in found] == list(range(1, len(rows) + 1))
    for row, (values, _) in zip(found, rows, strict=True):
        kept = {name: value for name, value in row.items() if name != "update" and value is not None}
        assert kept == pytest.approx(values, nan_ok=True)


def test_the_file_is_rewritten_at_most_every_interval(tmp_path):
    clock = Clock()
    writer = MetricsWriter(tmp_path, interval_s=5, clock=clock)
    writer.write(1, {"policy/tv": 1.0})
    assert read_metrics(tmp_path).num_rows == 0
    clock.now += 5
    writer.write(2, {"policy/tv": 2.0})
    assert read_metrics(tmp_path).num_rows == 2
    clock.now += 4.9
    writer.write(3, {"policy/tv": 3.0})
    assert read_metrics(tmp_path).num_rows == 2
    writer.flush()
    assert read_metrics(tmp_path).num_rows == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.parquet"]


def test_resume_drops_later_rows_and_continues(tmp_path):
    writer = MetricsWriter(tmp_path)
    for update in (1, 2, 3, 4):
        writer.write(update, {"policy/tv": float(update)})
    writer.close()
    again = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match=r"update=3 must be > 4"):
        again.write(3, {})
    again.truncate(2)
    assert read_metrics(tmp_path)["update"].to_pylist() == [1, 2]
    again.write(3, {"policy/tv": 30.0})
    again.close()
    assert read_metrics(tmp_path)["policy/tv"].to_pylist() == [1.0, 2.0, 30.0]
    again.truncate(0)
    again.write(1, {})
    assert again._last_update == 1


def test_truncate_reaches_rows_that_were_not_flushed(tmp_path):
    writer = MetricsWriter(tmp_path)
    for update in (1, 2, 3):
        writer.write(update, {"policy/tv": float(update)})
    writer.truncate(1)
    assert read_metrics(tmp_path)["update"].to_pylist() == [1]


def test_a_reader_never_sees_half_a_file(tmp_path):
    writer = MetricsWriter(tmp_path, interval_s=0)
    done, seen = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            seen.append(read_metrics(tmp_path).num_rows)

    reader = threading.Thread(target=read)
    reader.start()
    for update in range(1, 40):
        writer.write(update, {"policy/tv": 0.0})
        writer.flush()
    done.set()
    reader.join()
    assert seen == sorted(seen)
    assert len(seen) > 1


def test_reproducible_columns_exclude_timings_and_prefetch() -> None:
    numbers = ["update", "policy/tv", "replay/student_text.trained", "rollout/num_tokens"]
    speed = [
        "timing/x_s",
        "rollout/tokens_per_s",
        "replay/teacher_text.scored",
        "replay/bytes",
        "teacher/num_tokens",
        "teacher/num_texts",
        "teacher/num_bytes",
    ]
    table = pa.table({name: [1.0] for name in (*numbers, *speed)})
    assert reproducible(table).column_names == numbers


def test_metric_names():
    good = ["rollout/num_tokens", "policy/teacher_text.tv", "timing/update_s", "teacher/tokens_per_s"]
    bad = ["loss", "trainer/lr", "timing/update", "policy/TV", "policy/"]
    assert name_violations([*good, *bad]) == bad


# Events


def test_events_are_lines_of_json_in_utc(tmp_path):
    log = EventLog(tmp_path)
    log.write("weights_pushed", policy_version=np.int64(3), seconds=float("nan"), path=tmp_path)
    log.write("done")
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2  # before it is closed
    log.close()
    first, second = read_events(tmp_path)
    assert first["event"] == "weights_pushed"
    assert first["policy_version"] == 3
    assert first["seconds"] is None
    assert first["path"] == str(tmp_path)
    assert datetime.fromisoformat(second["time"]).utcoffset().total_seconds() == 0


def test_a_line_that_a_crash_cut_is_the_only_one_lost(tmp_path):
    log = EventLog(tmp_path)
    log.write("first")
    log.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": "2026')
    log = EventLog(tmp_path)
    log.write("second")
    log.close()
    assert [event["event"] for event in read_events(tmp_path)] == ["first", "second"]


def test_events_of_several_threads_do_not_mix(tmp_path):
    log = EventLog(tmp_path)
    threads = [
        threading.Thread(target=lambda: [log.write("e", text="x" * 5000) for _ in range(20)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 80


def test_reserved_fields_are_rejected_and_no_file_means_no_events(tmp_path):
    assert list(read_events(tmp_path)) == []
    log = EventLog(tmp_path)
    with pytest.raises(ValueError, match="field time"):
        log.write("e", time=3)
    log.close()
