"""The trace of a run, from folders in every state."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.cli.main import main
from deploy.report.chrome_trace import Lanes
from deploy.report.trace import write_trace
from distill.errors import ConfigError
from distill.replay.spans import NONE, SpanBuffer, SpanKind, SpanOutcome
from distill.run.folder import RunFolder
from distill.run.span_file import SpanFile
from tests.unit.deploy.run_folders import run_folder
from tests.unit.deploy.traced_runs import START_NS, assert_valid, load, slices, traced_run

INTERVALS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10)), max_size=60)


@given(INTERVALS)
def test_lanes_have_no_overlaps_and_are_as_few_as_possible(pairs: list[tuple[int, int]]) -> None:
    spans = sorted(((start, start + length) for start, length in pairs), key=lambda span: span[1])
    lanes = Lanes()
    placed = [(lanes.place(*span), span) for span in spans]
    for lane in {lane for lane, _ in placed}:
        of_lane = sorted(span for other, span in placed if other == lane)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(of_lane))
    at_once = [sum(start <= time < end for start, end in spans) for time in range(62)]
    empty = any(start == end for start, end in spans)
    assert len({lane for lane, _ in placed}) <= max(at_once) + empty


@given(INTERVALS)
def test_lanes_have_no_overlaps_in_any_order_of_spans(pairs: list[tuple[int, int]]) -> None:
    lanes = Lanes()
    placed = [(lanes.place(start, start + length), start, start + length) for start, length in pairs]
    for lane in {each[0] for each in placed}:
        of_lane = sorted(each[1:] for each in placed if each[0] == lane)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(of_lane))


def test_a_trace_shows_every_span_on_the_lanes_of_its_actor(tmp_path: Path) -> None:
    written = write_trace(traced_run(tmp_path / "run").path)
    trace = load(written.path)
    assert_valid(trace)
    assert written.path == tmp_path / "run" / "trace.json"
    assert len(slices(trace)) == written.num_spans > 50
    assert trace["otherData"] == {
        "incarnations": [1],
        "spans": written.num_spans,
        "dropped": 0,
        "problems": [],
    }
    named = [event for event in trace["traceEvents"] if event["name"] == "process_name"]
    names = {event["pid"]: event["args"]["name"] for event in named}
    assert {"driver", "learner", "replay", "rollout-0", "rollout-1", "teacher-0", "teacher-1"} == set(
        names.values()
    )
    for each in slices(trace):
        member = names[each["pid"]]
        if each["cat"] in ("rollout", "scoring"):
            assert each["args"]["actor"].startswith(f"{member}.")
    assert {each["cat"] for each in slices(trace)} == {
        "rollout", "scoring", "ready", "lease", "update", "write", "push", "load",
    }  # fmt: skip
    counters = [event for event in trace["traceEvents"] if event["ph"] == "C"]
    assert [(event["name"], event["args"]) for event in counters] == [
        ("student groups", {"drawn": 3.0, "scored": 2.0}),
        ("policy age", {"max": 1.0}),
    ]


def test_arrows_lead_from_each_draw_past_its_scoring_to_the_lease_of_its_update(tmp_path: Path) -> None:
    trace = load(write_trace(traced_run(tmp_path / "run", deaths=0).path).path)
    by_place = {(each["pid"], each["tid"], each["ts"]): each for each in slices(trace) if each["dur"]}
    ends = {
        (each["pid"], each["tid"], each["ts"] + each["dur"] - 1): each
        for each in slices(trace)
        if each["dur"]
    }
    steps: dict[int, list[str]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] in "stf" and event["name"] == "draw":
            place = (event["pid"], event["tid"], event["ts"])
            each = (ends if event["ph"] == "s" else by_place).get(place)
            if each is not None:
                steps.setdefault(event["id"], []).append(each["cat"])
    whole = [path for path in steps.values() if path == ["rollout", "scoring", "lease"]]
    assert len(whole) > 10
    leased = [each for each in slices(trace) if each["cat"] == "ready" and each["name"].startswith("draw")]
    assert {each["args"]["update"] for each in leased} == {1, 2, 3, 4, 5}
    assert sum(each["args"]["samples"] for each in leased) == sum(
        each["cat"] == "rollout" and "update" in each["args"] for each in slices(trace)
    )


def test_updates_that_are_made_again_stay_and_have_their_incarnation(tmp_path: Path) -> None:
    written = write_trace(traced_run(tmp_path / "run", num_starts=3).path)
    trace = load(written.path)
    assert_valid(trace)
    assert written.incarnations == [1, 2, 3]
    first = [each for each in slices(trace) if each["name"] == "update 1" and "outcome" not in each["args"]]
    assert {each["args"]["incarnation"] for each in first} == {1, 2, 3}


def test_what_ended_badly_says_so(tmp_path: Path) -> None:
    trace = load(write_trace(traced_run(tmp_path / "run", num_starts=3, deaths=3).path).path)
    lost = [each for each in slices(trace) if each["args"].get("outcome") == "lost"]
    assert lost and all(
        "update" not in each["args"] for each in lost if each["cat"] in ("rollout", "scoring")
    )
    assert any(each["args"].get("issue", 0) > 0 for each in slices(trace)), (
        "work of dead actors is issued again"
    )


def test_a_name_that_ends_in_gz_is_compressed(tmp_path: Path) -> None:
    folder = traced_run(tmp_path / "run")
    plain = write_trace(folder.path)
    packed = write_trace(folder.path, tmp_path / "other" / "trace.json.gz")
    assert json.loads(gzip.decompress(packed.path.read_bytes())) == load(plain.path)
    assert packed.path.stat().st_size < plain.path.stat().st_size / 4


# Folders in every state


def _cut(folder: RunFolder) -> None:
    data = folder.spans.read_bytes()
    folder.spans.write_bytes(data[: data.rindex(b'"counters"')])


def _foreign_part(folder: RunFolder) -> None:
    with folder.spans.open("a") as file:
        file.write('{"spans_format": 7, "incarnation": 2}\n{"spans": "another shape"}\n')


def _dropped(folder: RunFolder) -> None:
    buffer = SpanBuffer(capacity=0)
    buffer.add((0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    file = SpanFile(folder.spans, 2)
    file.write(buffer.drain())
    file.close()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, "spans.jsonl has one line that a crash or a running write cut; the others are shown"),
        (_foreign_part, "a part of spans.jsonl has format 7, of another version; it is not shown"),
        (_dropped, "one span was dropped, because there was no room for them"),
    ],
)
def test_what_can_be_shown_is_shown_and_the_rest_named(
    damage: Callable[[RunFolder], None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = traced_run(tmp_path / "run")
    whole = len(slices(load(write_trace(folder.path).path)))
    damage(folder)
    assert main(["trace", str(folder.path)]) == 0
    assert capsys.readouterr().err == f"distill: {says}\n"
    trace = load(folder.path / "trace.json")
    assert_valid(trace)
    assert len(slices(trace)) == whole
    assert trace["otherData"]["problems"] == [says]


def test_a_run_that_is_being_written_has_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = traced_run(tmp_path / "run")
    folder._take_lock()
    try:
        assert main(["trace", str(folder.path)]) == 0
    finally:
        folder.close()
    assert "still being written; the trace ends with its last update" in capsys.readouterr().err


def _remove(folder: RunFolder) -> None:
    folder.spans.unlink()


def _only_started(folder: RunFolder) -> None:
    folder.spans.unlink()
    SpanFile(folder.spans, 1).close()


def _all_foreign(folder: RunFolder) -> None:
    folder.spans.write_text('{"spans_format": "\\u001b[2J9", "incarnation": 1}\n{"spans": {}}\n')


def _all_torn(folder: RunFolder) -> None:
    folder.spans.write_text('{"spans')


def _a_folder(folder: RunFolder) -> None:
    folder.spans.unlink()
    folder.spans.mkdir()


@pytest.mark.parametrize(
    ("damage", "must"),
    [
        (
            _remove,
            "be there: a run writes it while it trains, unless its version of distill is older than traces",
        ),
        (_only_started, "have a span, and the run has made no update yet"),
        (_all_foreign, "have format 1 (it has 9)"),
        (_all_torn, "have a whole line"),
        (_a_folder, "be readable"),
    ],
)
def test_a_folder_without_spans_is_refused_with_the_reason(
    damage: Callable[[RunFolder], None], must: str, tmp_path: Path
) -> None:
    folder = traced_run(tmp_path / "run")
    damage(folder)
    with pytest.raises(ConfigError) as raised:
        write_trace(folder.path)
    assert must in raised.value.must and raised.value.remedy
    assert not (folder.path / "trace.json").exists()
    assert not [path for path in folder.path.iterdir() if path.name.endswith(".tmp")]


def test_the_command_says_where_the_trace_is_and_how_to_open_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(tmp_path / "none")]) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
    folder = traced_run(tmp_path / "run")
    assert main(["trace", str(folder.path), "--out", str(tmp_path / "x.json")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert str(tmp_path / "x.json") in last
    assert "https://ui.perfetto.dev" in last and "chrome://tracing" in last


@pytest.mark.parametrize(
    "out", ["run/run.json", "run/summary.json", "run/metrics.parquet", "x.txt", "file/x.json"]
)
def test_a_trace_replaces_no_other_file(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = traced_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    before = {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    assert main(["trace", str(folder.path), "--out", str(tmp_path / out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == before


def long_run(path: Path, num_updates: int, per_update: int = 16) -> RunFolder:
    folder = run_folder(path)
    file = SpanFile(folder.spans, 1)
    for update in range(num_updates):
        buffer, now = SpanBuffer(), START_NS + update * 10**9
        rollout, teacher, replay = (
            buffer.lane(name) for name in ("rollout-0.1000", "teacher-0.1000", "replay")
        )
        end = now + 9 * 10**8
        for place in range(per_update):
            draw, then = update * per_update + place, now + place * 10**6
            scored, done = then + 3 * 10**8, then + 4 * 10**8
            buffer.add((SpanKind.ROLLOUT, rollout, 0, draw, 0, 0, then, scored, 9, 1, NONE, SpanOutcome.DONE))
            buffer.add((SpanKind.SCORING, teacher, 0, draw, 0, 0, scored, done, 9, 1, NONE, SpanOutcome.DONE))
            buffer.add((SpanKind.READY, replay, 0, draw, 0, 1, done, end, 9, 1, update + 1, SpanOutcome.DONE))
        buffer.add((SpanKind.LEASE, replay, 0, NONE, NONE, per_update, end, end + 10, 9, NONE, update + 1, 0))
        learner = buffer.lane("learner")
        buffer.add((SpanKind.UPDATE, learner, 0, NONE, NONE, NONE, end, end + 10, NONE, NONE, update + 1, 0))
        file.write(buffer.drain())
    file.close()
    return folder


def test_the_memory_of_the_command_does_not_grow_with_the_run(tmp_path: Path) -> None:
    def peak_bytes(num_updates: int) -> int:
        folder = long_run(tmp_path / str(num_updates), num_updates)
        tracemalloc.start()
        written = write_trace(folder.path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert written.num_spans == num_updates * (3 * 16 + 2)
        return peak

    peak_bytes(5)
    assert peak_bytes(400) < 2 * peak_bytes(20)
