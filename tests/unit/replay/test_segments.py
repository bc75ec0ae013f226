"""The segment store on real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distill.interfaces import Draw, Location, SegmentMissing
from distill.replay.segments import RemoteSegment, SegmentStore, sweep
from distill.schema import Trajectory, hidden_rows, trajectory_batch, with_teacher_hidden

WIDTH = 32


def draw(number: int) -> Draw:
    return Draw(table="student_text", number=number, epoch=0, index=number)


def rows(number: int, num_rows: int = 2, num_tokens: int = 20) -> pa.RecordBatch:
    return trajectory_batch(
        [
            Trajectory(
                draw_id=draw(number).draw_id,
                source="student",
                prompt_index=number,
                sample_index=sample,
                prompt_tokens=[1, 2, 3],
                response_tokens=list(range(num_tokens)),
                behavior_logprobs=[-1.0] * num_tokens,
                policy_versions=[(0, 4 + sample), (5, 1000)],
                finish_reason="stop",
            )
            for sample in range(num_rows)
        ]
    )


def scored_rows(number: int, num_rows: int = 2, num_tokens: int = 20) -> pa.RecordBatch:
    states = [np.full((num_tokens, WIDTH), number + row, np.uint16) for row in range(num_rows)]
    return with_teacher_hidden(rows(number, num_rows, num_tokens), states)


@pytest.fixture
def make_store(tmp_path):
    def make(writer_id="teacher-0", segment_bytes=1 << 20, memory_bytes=1 << 30, node="n"):
        return SegmentStore(
            memory_dir=tmp_path / "memory",
            spill_dir=tmp_path / "spill",
            writer_id=writer_id,
            node=node,
            segment_bytes=segment_bytes,
            memory_bytes=memory_bytes,
        )

    return make


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_groups_are_read_back_equal_with_and_without_payload(make_store):
    store = make_store()
    batches = [rows(0), scored_rows(1), scored_rows(2, num_rows=3), rows(3)]
    refs = [store.append(draw(number), batch) for number, batch in enumerate(batches)]
    reader = make_store("learner-0")
    for ref, batch in zip(refs, batches, strict=True):
        got = reader.read(ref)
        got.validate(full=True)
        assert got.equals(batch, check_metadata=True)
    assert [ref.location.offset % 64 for ref in refs] == [0] * 4
    assert (refs[2].num_rows, refs[2].num_tokens, refs[2].oldest_version) == (3, 60, 4)
    assert len({ref.location.segment for ref in refs}) == 3, "a segment has one schema"


def test_reading_copies_nothing(make_store):
    ref = make_store().append(draw(0), scored_rows(0))
    before = pa.total_allocated_bytes()
    batch = make_store("learner-0").read(ref)
    assert pa.total_allocated_bytes() - before < 4096
    states = hidden_rows(batch)
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if ref.location.segment in line]
    address = states[0].__array_interface__["data"][0]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in spans)
    assert address % 8 == 0
    for column in ("response_tokens", "behavior_logprobs"):
        values = batch.column(column).buffers()[-1].address
        assert any(int(start, 16) <= values < int(end, 16) for start, end in spans)


def test_a_slice_writes_only_its_own_bytes(make_store):
    parent = scored_rows(0, num_rows=100)
    store = make_store()
    alone = store.append(draw(1), parent.slice(0, 2)).location.num_bytes
    ref = store.append(draw(1), parent.slice(50, 2))
    assert ref.location.num_bytes < alone + 1024 < parent.nbytes / 10
    assert ref.num_tokens == 40
    got = store.read(ref)
    assert got.equals(parent.slice(50, 2))
    assert hidden_rows(got)[1][0, 0] == 51


def test_a_reader_sees_groups_appended_after_it_mapped_the_file(make_store):
    store, reader = make_store(), make_store("learner-0")
    first = reader.read(store.append(draw(0), scored_rows(0)))
    second = reader.read(store.append(draw(1), scored_rows(1)))
    assert first.equals(scored_rows(0).set_column(13, "scored_at", first.column("scored_at")))
    assert hidden_rows(second)[0][0, 0] == 1


def test_oldest_segments_move_to_disk_while_a_reader_holds_them(make_store, tmp_path):
    store = make_store(segment_bytes=4096, memory_bytes=20_000)
    reader = make_store("learner-0")
    refs, held = [], []
    for number in range(12):
        refs.append(store.append(draw(number), scored_rows(number)))
        held.append(reader.read(refs[-1]))
    spilled = files(tmp_path / "spill")
    assert spilled, "nothing was moved"
    assert not set(spilled) & set(files(tmp_path / "memory"))
    assert sum(path.stat().st_size for path in (tmp_path / "memory").iterdir()) <= 20_000
    assert refs[0].location.segment in spilled
    assert refs[-1].location.segment not in spilled
    for number, ref in enumerate(refs):
        assert hidden_rows(held[number])[0][0, 0] == number
        assert reader.read(ref).equals(held[number])


def test_the_bound_counts_every_writer_but_each_moves_only_its_own_files(make_store, tmp_path):
    other = make_store("rollout-0", segment_bytes=4096, memory_bytes=1 << 30)
    for number in range(6):
        other.append(draw(number), scored_rows(number))
    store = make_store(segment_bytes=4096, memory_bytes=10_000)
    for number in range(3):
        store.append(draw(number), scored_rows(number))
    assert files(tmp_path / "spill")
    assert all(name.startswith("teacher-0") for name in files(tmp_path / "spill"))


def test_a_reader_drops_its_maps_of_moved_files(make_store):
    store = make_store(segment_bytes=4096, memory_bytes=8192)
    reader = make_store("learner-0")
    for number in range(8):
        reader.read(store.append(draw(number), scored_rows(number)))
    with open("/proc/self/maps") as maps:
        assert sum("(deleted)" in line and "teacher-0" in line for line in maps) <= 1


def test_groups_survive_the_kill_of_their_writer(make_store, tmp_path):
    script = f"""
import json, sys
from dataclasses import asdict
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.unit.replay.test_segments import SegmentStore, draw, scored_rows
store = SegmentStore(memory_dir=Path({str(tmp_path / "memory")!r}), spill_dir=Path({str(tmp_path / "spill")!r}),
                     writer_id="teacher-7", node="n", segment_bytes=1 << 20, memory_bytes=1 << 30)
print(json.dumps(asdict(store.append(draw(5), scored_rows(5)).location)), flush=True)
input()
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with writer:
        location = Location(**json.loads(writer.stdout.readline()))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    elsewhere = make_store("rollout-0").append(draw(5), rows(5))
    ref = replace(elsewhere, location=location)
    assert hidden_rows(make_store().read(ref))[0][0, 0] == 5
    # Its successor continues the numbering and leaves the old file alone.
    heir = make_store("teacher-7")
    new = heir.append(draw(6), scored_rows(6))
    assert (ref.location.segment, new.location.segment) == ("teacher-7-0.arrow", "teacher-7-1.arrow")
    heir.append(draw(7), rows(7))  # another schema: another segment
    heir.release({new.location.segment: 1})
    assert new.location.segment not in files(tmp_path / "memory")
    assert hidden_rows(make_store().read(ref))[0][0, 0] == 5


def test_release_waits_for_groups_that_are_not_announced_yet(make_store, tmp_path):
    store = make_store(segment_bytes=1 << 15)
    refs = []
    while len({ref.location.segment for ref in refs}) < 2:
        refs.append(store.append(draw(0), scored_rows(0)))
    first = refs[0].location.segment
    count = sum(ref.location.segment == first for ref in refs)
    assert count > 1
    store.release({first: count - 1})
    assert store.read(refs[0]).num_rows == 2
    store.release({first: count, "rollout-9-0.arrow": 3})
    assert first not in files(tmp_path / "memory")
    with pytest.raises(
        SegmentMissing,
        match=rf"^segment {first} must be in .*memory or .*spill; .*; resume from the newest checkpoint$",
    ):
        store.read(refs[0])


def test_release_of_the_open_segment_takes_effect_when_it_closes(make_store, tmp_path):
    store = make_store()
    ref = store.append(draw(0), scored_rows(0))
    store.release({ref.location.segment: 1})
    assert store.read(ref).num_rows == 2
    store.append(draw(1), rows(1))  # another schema: another segment
    assert files(tmp_path / "memory") == ["teacher-0-1.arrow"]


def test_groups_that_never_reach_the_replay_are_deleted_by_discard(make_store, tmp_path):
    store = make_store()
    known = store.append(draw(0), rows(0))
    heldout = store.append(draw(1), rows(1))
    store.append(draw(2), scored_rows(2))
    store.release({known.location.segment: 1})
    assert known.location.segment in files(tmp_path / "memory")
    store.discard([heldout])
    assert known.location.segment not in files(tmp_path / "memory")


def test_a_group_on_another_node_is_rejected(make_store):
    ref = make_store(node="a").append(draw(0), rows(0))
    with pytest.raises(
        RemoteSegment, match=r"^location\.node=a must be this node \(b\).*; run all roles on one node$"
    ):
        make_store("learner-0", node="b").read(ref)


def test_a_full_medium_leaves_nothing_half_written(make_store, monkeypatch, tmp_path):
    store = make_store()
    first = store.append(draw(0), rows(0))
    real, calls = os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) == 1:
            return real(descriptor, data[:100], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        store.append(draw(1), rows(1))
    monkeypatch.undo()
    assert (tmp_path / "memory" / first.location.segment).stat().st_size <= calls[0]
    second = store.append(draw(2), rows(2))
    assert second.location.offset == calls[0]
    assert store.read(first).equals(rows(0))
    assert store.read(second).equals(rows(2))


def test_sweep_removes_folders_of_dead_runs_only(tmp_path):
    for run in ("dead", "alive"):
        segments = tmp_path / f"distill-{run}" / "segments"
        segments.mkdir(parents=True)
        (segments / "a.arrow").write_bytes(b"x")
    (tmp_path / "another-program").mkdir()
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "distill-link").symlink_to(target)
    assert sweep(tmp_path, lambda run: run == "alive") == [tmp_path / "distill-dead"]
    assert files(tmp_path) == ["another-program", "distill-alive", "distill-link", "elsewhere"]
