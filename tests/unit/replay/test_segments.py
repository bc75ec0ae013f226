"""The segment store on real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from distill.interfaces import Draw, Location, SegmentMissing
from distill.replay.segments import RemoteSegment, SegmentStore, sweep
from distill.replay.tidy import delete_dead_segments
from distill.room import NoSpace
from distill.schema import Trajectory, hidden_rows, trajectory_batch, with_teacher_hidden
from tests.media import fill, mounted

WIDTH = 32


def draw(number: int) -> Draw:
    return Draw(table="student_text", number=number, epoch=0, index=number)


def row(number: int, sample: int = 0, num_tokens: int = 20) -> pa.RecordBatch:
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
        ]
    )


def scored_row(number: int, sample: int = 0, num_tokens: int = 20) -> pa.RecordBatch:
    states = np.full((num_tokens, WIDTH), number + sample, np.uint16)
    return with_teacher_hidden(row(number, sample, num_tokens), [states])


@pytest.fixture
def make_store(tmp_path):
    def make(writer_id="teacher-0.0", segment_bytes=1 << 20, memory_bytes=1 << 30, node="n", **more):
        return SegmentStore(
            memory_dir=tmp_path / "memory",
            spill_dir=tmp_path / "spill",
            writer_id=writer_id,
            node=node,
            segment_bytes=segment_bytes,
            memory_bytes=memory_bytes,
            **more,
        )

    return make


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rows_are_read_back_equal_with_and_without_payload(make_store):
    store = make_store()
    cases = [(0, row(0)), (1, scored_row(1)), (2, scored_row(2, num_tokens=30)), (3, row(3))]
    refs = [store.append(draw(number), 0, batch) for number, batch in cases]
    reader = make_store("learner")
    for ref, (_, batch) in zip(refs, cases, strict=True):
        got = reader.read(ref)
        got.validate(full=True)
        assert got.equals(batch, check_metadata=True)
    assert [ref.location.offset % 64 for ref in refs] == [0] * 4
    assert (refs[2].num_tokens, refs[2].oldest_version) == (30, 4)
    assert len({ref.location.segment for ref in refs}) == 3, "a segment has one schema"


def test_reading_copies_nothing(make_store):
    ref = make_store().append(draw(0), 0, scored_row(0))
    before = pa.total_allocated_bytes()
    batch = make_store("learner").read(ref)
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
    parent = pa.concat_batches([scored_row(0, sample) for sample in range(100)])
    store = make_store()
    alone = store.append(draw(0), 0, scored_row(0)).location.num_bytes
    ref = store.append(draw(0), 50, parent.slice(50, 1))
    assert ref.location.num_bytes < alone + 1024 < parent.nbytes / 10
    assert ref.num_tokens == 20
    got = store.read(ref)
    assert got.equals(parent.slice(50, 1))
    assert hidden_rows(got)[0][0, 0] == 50


def test_another_row_in_the_place_of_the_one_that_is_wanted_is_an_error(make_store):
    store = make_store()
    first, second = store.append(draw(0), 0, row(0)), store.append(draw(0), 1, row(0, 1))
    with pytest.raises(
        SegmentMissing,
        match=r"^row in segment teacher-0\.0-0\.arrow at \d+=student_text-0-0/1 must be student_text-0-0/0; resume",
    ):
        store.read(
            replace(first, location=replace(second.location, trajectory_id=first.location.trajectory_id))
        )


def test_a_reader_sees_rows_appended_after_it_mapped_the_file(make_store):
    store, reader = make_store(), make_store("learner")
    first = reader.read(store.append(draw(0), 0, scored_row(0)))
    second = reader.read(store.append(draw(1), 0, scored_row(1)))
    assert first.equals(scored_row(0).set_column(13, "scored_at", first.column("scored_at")))
    assert hidden_rows(second)[0][0, 0] == 1


def test_oldest_segments_move_to_disk_while_a_reader_holds_them(make_store, tmp_path):
    store = make_store(segment_bytes=4096, memory_bytes=20_000)
    reader = make_store("learner")
    refs, held = [], []
    for number in range(12):
        refs.append(store.append(draw(number), 0, scored_row(number)))
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
    other = make_store("rollout-0.0", segment_bytes=4096, memory_bytes=1 << 30)
    for number in range(6):
        other.append(draw(number), 0, scored_row(number))
    store = make_store(segment_bytes=4096, memory_bytes=10_000)
    for number in range(3):
        store.append(draw(number), 0, scored_row(number))
    assert files(tmp_path / "spill")
    assert all(name.startswith("teacher-0.0") for name in files(tmp_path / "spill"))


def test_a_reader_drops_its_maps_of_moved_files(make_store):
    store = make_store(segment_bytes=4096, memory_bytes=8192)
    reader = make_store("learner")
    for number in range(8):
        reader.read(store.append(draw(number), 0, scored_row(number)))
    with open("/proc/self/maps") as maps:
        assert sum("(deleted)" in line and "teacher-0" in line for line in maps) <= 1


def test_groups_survive_the_kill_of_their_writer(make_store, tmp_path):
    script = f"""
import json, sys
from dataclasses import asdict
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.unit.replay.test_segments import SegmentStore, draw, scored_row
store = SegmentStore(memory_dir=Path({str(tmp_path / "memory")!r}), spill_dir=Path({str(tmp_path / "spill")!r}),
                     writer_id="teacher-7.0", node="n", segment_bytes=1 << 20, memory_bytes=1 << 30)
print(json.dumps(asdict(store.append(draw(5), 0, scored_row(5)).location)), flush=True)
input()
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with writer:
        location = Location(**json.loads(writer.stdout.readline()))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    elsewhere = make_store("rollout-0.0").append(draw(5), 0, row(5))
    ref = replace(elsewhere, location=location)
    assert hidden_rows(make_store().read(ref))[0][0, 0] == 5
    # Its heir has another name, so its first segment has another one too.
    new = make_store("teacher-7.1").append(draw(6), 0, scored_row(6))
    assert (ref.location.segment, new.location.segment) == ("teacher-7.0-0.arrow", "teacher-7.1-0.arrow")
    assert hidden_rows(make_store().read(ref))[0][0, 0] == 5


def test_a_writer_id_is_never_used_again(make_store):
    make_store().append(draw(0), 0, row(0))
    with pytest.raises(FileExistsError):
        make_store().append(draw(1), 0, row(1))


def test_a_segment_is_settled_when_it_is_closed_and_each_of_its_rows_is_announced(make_store, tmp_path):
    store = make_store(segment_bytes=1 << 14)
    refs = []
    while len({ref.location.segment for ref in refs}) < 2:
        refs.append(store.append(draw(0), 0, scored_row(0)))
    first = [ref for ref in refs if ref.location.segment == refs[0].location.segment]
    assert len(first) > 1
    store.settle(first[1:])
    assert store.settled_segments() == []
    store.settle(
        [first[0], replace(refs[0], location=replace(refs[0].location, segment="rollout-9.0-0.arrow"))]
    )
    assert store.settled_segments() == [first[0].location.segment]
    store.settle(refs[len(first) :])
    assert store.settled_segments() == [first[0].location.segment], "the other one is open"
    store.delete(store.settled_segments())
    assert first[0].location.segment not in files(tmp_path / "memory")
    assert store.settled_segments() == []
    with pytest.raises(
        SegmentMissing,
        match=rf"^segment {first[0].location.segment} must be in .*memory or .*spill; .*; resume from the newest",
    ):
        store.read(refs[0])


def test_rows_stay_in_memory_while_the_disk_has_no_room(make_store, monkeypatch, tmp_path):
    store = make_store(segment_bytes=4096, memory_bytes=8192)
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("shutil.copyfile", full)
        refs = [store.append(draw(0), 0, scored_row(0)) for _ in range(12)]
    assert len(files(tmp_path / "memory")) > 3
    assert files(tmp_path / "spill") == []
    refs += [store.append(draw(0), 0, scored_row(0)) for _ in range(6)]
    assert files(tmp_path / "spill"), "it goes on when there is room"
    assert all(hidden_rows(store.read(ref))[0].shape == (20, WIDTH) for ref in refs)
    store.settle(refs)
    store.append(draw(1), 0, row(1))  # another schema closes the open segment
    store.delete(store.settled_segments())
    assert len(files(tmp_path / "memory")) == 1
    assert files(tmp_path / "spill") == []


async def test_dead_segments_are_deleted_however_often_the_question_is_asked(make_store, tmp_path):
    store = make_store(segment_bytes=4096)
    refs = [store.append(draw(number), 0, scored_row(number)) for number in range(4)]
    store.settle(refs)
    live = {refs[1].location.segment}

    class Replay:
        async def live_segments(self, names):
            return [name for name in names if name in live]

    await delete_dead_segments(Replay(), store)
    await delete_dead_segments(Replay(), store)
    assert refs[1].location.segment in files(tmp_path / "memory")
    assert store.read(refs[1]).num_rows == 1
    live.clear()
    await delete_dead_segments(Replay(), store)
    assert refs[1].location.segment not in files(tmp_path / "memory")


def test_a_row_on_another_node_is_rejected(make_store):
    ref = make_store(node="a").append(draw(0), 0, row(0))
    with pytest.raises(
        RemoteSegment, match=r"^location\.node=a must be this node \(b\).*; run all roles on one node$"
    ):
        make_store("learner", node="b").read(ref)


def test_a_full_medium_leaves_nothing_half_written(make_store, monkeypatch, tmp_path):
    store = make_store()
    first = store.append(draw(0), 0, row(0))
    path = tmp_path / "memory" / first.location.segment
    size = path.stat().st_size
    real, calls = os.pwritev, []

    def full(descriptor, parts, offset):
        calls.append(offset)
        if len(calls) == 1:
            return real(descriptor, parts[:3], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(
        NoSpace, match=r"^free space for .*/spill/teacher-0\.0-1\.arrow=.* must be >= .*; free some there"
    ):
        store.append(draw(1), 0, row(1))
    monkeypatch.undo()
    assert path.stat().st_size == size
    assert files(tmp_path / "spill") == []
    second = store.append(draw(2), 0, row(2))
    assert store.read(first).equals(row(0))
    assert store.read(second).equals(row(2))


def test_rows_go_to_the_disk_while_shared_memory_is_full(make_store, tmp_path):
    with mounted(tmp_path / "memory", 256 << 10) as memory:
        store = make_store(segment_bytes=64 << 10)
        rows = [scored_row(i, num_tokens=400) for i in range(20)]
        refs = [store.append(draw(i), 0, each) for i, each in enumerate(rows)]
        assert files(tmp_path / "spill")
        assert files(memory), "what fits is in memory"
        assert store.num_diverted == len(files(tmp_path / "spill"))
        reader = make_store("learner")
        assert all(reader.read(ref).equals(each) for ref, each in zip(refs, rows, strict=True))
        del reader  # its maps would keep the memory
        store.settle(refs)
        store.append(draw(99), 0, row(99))  # another schema closes the open segment
        store.delete(store.settled_segments())
        assert len(files(memory) + files(tmp_path / "spill")) == 1
        ref = store.append(draw(100), 0, scored_row(100, num_tokens=400))
        assert ref.location.segment in files(memory), "memory is used again when there is room"


def test_a_row_waits_until_one_of_the_media_has_room(make_store, tmp_path):
    with mounted(tmp_path / "memory", 64 << 10) as memory, mounted(tmp_path / "spill", 64 << 10) as disk:
        store, large = make_store(wait_for_room_s=60), scored_row(1, num_tokens=200)
        first = store.append(draw(0), 0, row(0))
        fillings = fill(memory), fill(disk)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(store.append, draw(1), 0, large)
            with pytest.raises(TimeoutError):
                waiting.result(0.5)
            store.settle([first])  # the actor's event loop calls this meanwhile
            fillings[1].unlink()
            assert store.read(waiting.result(30)).equals(large)
        assert store.read(first).equals(row(0))
        fill(disk)
        impatient = make_store("teacher-0.1", wait_for_room_s=0.1)
        with pytest.raises(NoSpace):
            impatient.append(draw(2), 0, row(2))
        assert not [name for name in files(memory) + files(disk) if name.startswith("teacher-0.1")]


def test_a_row_is_whole_however_little_the_system_writes_at_a_time(make_store, monkeypatch):
    real = os.pwritev

    def a_little(descriptor, parts, offset):
        return real(descriptor, [b"".join(parts)[:37]], offset)

    monkeypatch.setattr(os, "pwritev", a_little)
    store = make_store()
    refs = [store.append(draw(i), 0, row(i)) for i in range(2)]
    assert [store.read(ref) for ref in refs] == [row(0), row(1)]


def test_a_message_is_what_arrow_serializes(make_store, tmp_path):
    store = make_store()
    for each in (row(0), row(1), row(0).slice(0, 1)):
        ref = store.append(draw(0), 0, each)
        data = (tmp_path / "memory" / ref.location.segment).read_bytes()
        message = data[ref.location.offset :][: ref.location.num_bytes]
        assert message == each.serialize().to_pybytes()


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
