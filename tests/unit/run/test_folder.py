"""Who may use a run folder, what survives a kill, and the memory of process trees."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from deploy.cluster.memory import MemorySampler, pss_bytes
from distill.errors import ConfigError, Diverged
from distill.run.folder import RunFolder
from distill.run.policy_version import PolicyVersionCounter

PYTHON = [sys.executable, "-u", "-c"]


def test_a_new_folder_and_its_paths(tmp_path):
    with RunFolder(tmp_path / "a" / "run") as folder:
        assert folder.create("seed: 0\n", "abc") is False
        assert folder.config.read_text() == "seed: 0\n"
        assert folder.checkpoints == tmp_path / "a" / "run" / "checkpoints"
        assert folder.evaluation("before").name == "before.parquet"
        assert len(folder.run_id) == 8
        assert int(folder.run_id, 16) >= 0
        assert (folder.incarnation, folder.fingerprint) == (1, "abc")


def test_the_same_configuration_resumes_with_the_same_id(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.create("a", "abc")
        first = folder.run_id
    with RunFolder(tmp_path) as folder:
        assert folder.create("b", "abc") is True
        assert (folder.run_id, folder.incarnation) == (first, 2)
        assert folder.config.read_text() == "b"
    with RunFolder(tmp_path) as folder:
        assert folder.create("b", "abc") is True
        assert (folder.run_id, folder.incarnation) == (first, 3)


def test_a_different_configuration_is_rejected_and_changes_nothing(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.create("a", "abc")
    with pytest.raises(
        ConfigError, match=r"run_dir=.* must be new or contain a run of this configuration.*xyz.*abc"
    ):
        RunFolder(tmp_path).create("b", "xyz")
    with RunFolder(tmp_path) as folder:
        assert folder.config.read_text() == "a"
        assert folder.create("a", "abc") is True
        assert folder.incarnation == 2


def test_missing_runs_and_foreign_folders_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="must be the folder of a run"):
        RunFolder(tmp_path / "none").require()
    RunFolder(tmp_path / "none").refuse_foreign_files()
    assert not (tmp_path / "none").exists()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"it contains thesis\.tex"):
        RunFolder(tmp_path).create("a", "abc")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a folder that can be created"):
        RunFolder(tmp_path / "file").create("a", "abc")


def test_a_start_that_died_before_run_json_can_be_repeated(tmp_path):
    (tmp_path / ".lock").write_text("pid 1 on x")
    (tmp_path / "config.yaml").write_text("a")
    (tmp_path / ".run.json.77-0.tmp").write_text("{")
    (tmp_path / ".student.tmp").mkdir()
    (tmp_path / ".student.tmp" / "model.safetensors").write_text("half")
    with RunFolder(tmp_path) as folder:
        assert folder.create("a", "abc") is False
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.yaml", "run.json"]


# The lock


def start(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen([*PYTHON, code, *arguments], stdout=subprocess.PIPE, text=True)


HOLD = """
import sys, time
from distill.run.folder import RunFolder
RunFolder(sys.argv[1]).create("a", "abc")
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_never_hold_one_folder(tmp_path):
    with start(HOLD, str(tmp_path)) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match=rf"one process at a time \(pid {other.pid} on .*\); wait"):
                RunFolder(tmp_path).create("a", "abc")
            assert RunFolder(tmp_path).incarnation == 1  # readers need no lock
        finally:
            other.kill()
    with RunFolder(tmp_path) as folder:  # a kill leaves no stale lock
        folder.create("a", "abc")
        assert folder.incarnation == 2


def test_the_lock_works_within_a_process_and_ends_with_close(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create("a", "abc")
    with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        RunFolder(tmp_path).create("a", "abc")
    with pytest.raises(RuntimeError, match="already open"):
        folder.create("a", "abc")
    folder.close()
    folder.close()
    folder.create("a", "abc")
    folder.close()


# The policy-version counter


COUNT = """
import sys
from distill.run.policy_version import PolicyVersionCounter
versions = PolicyVersionCounter(sys.argv[1])
while True:
    print(versions.next(), flush=True)
"""


def test_a_version_is_never_used_again_after_a_kill(tmp_path):
    versions = PolicyVersionCounter(tmp_path)
    assert versions.last == 0
    seen = [versions.next()]
    for delay_s in (0.0, 0.01, 0.03):
        with start(COUNT, str(tmp_path)) as counter:
            seen.append(int(counter.stdout.readline()))
            time.sleep(delay_s)
            counter.send_signal(signal.SIGKILL)
            rest = counter.stdout.read().splitlines(keepends=True)
            seen += [int(line) for line in rest if line.endswith("\n")]
    seen.append(PolicyVersionCounter(tmp_path).next())
    assert seen[0] == 1
    assert len(seen) > 4
    assert all(a < b for a, b in itertools.pairwise(seen))
    assert versions.last == seen[-1]


def test_a_folder_that_is_refused_keeps_what_is_in_it(tmp_path):
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError):
        RunFolder(tmp_path).create("recipe: ammd\n", "fingerprint")
    assert (tmp_path / "replay" / "mine.txt").read_text() == "mine"


def test_the_version_is_on_disk_before_it_is_returned(tmp_path, monkeypatch):
    versions = PolicyVersionCounter(tmp_path)

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("distill.run.policy_version.write_json", power_cut)
        with pytest.raises(OSError, match="power cut"):
            versions.next()
    version = versions.next()
    assert json.loads((tmp_path / "policy_version.json").read_text()) == {"policy_version": version}


def test_concurrent_processes_get_different_versions(tmp_path):
    code = COUNT.replace("while True", "for _ in range(40)")
    with start(code, str(tmp_path)) as one, start(code, str(tmp_path)) as two:
        seen = [int(line) for other in (one, two) for line in other.stdout]
    assert sorted(seen) == list(range(1, 81))
    assert PolicyVersionCounter(tmp_path).last == 80


def test_only_the_holder_writes_the_summary(tmp_path):
    with pytest.raises(RuntimeError, match="must be opened"):
        RunFolder(tmp_path).write_summary({})


# Files


def test_summary_and_json(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.create("a", "abc")
        assert folder.read_summary() is None
        given = {"tv": float("nan"), "n": np.int64(3), "pairs": (1.5, np.float32(2)), "path": tmp_path}
        whole = dict.fromkeys(
            ("updates", "recipe", "before", "after", "timing_s", "peak_pss_bytes", "wall_s"), 0
        )
        folder.write_summary(whole | given)
        found = {"tv": None, "n": 3, "pairs": [1.5, 2.0], "path": str(tmp_path)}
        assert folder.read_summary() == whole | found
        folder.write_summary(given)
        with pytest.raises(
            ConfigError, match=r"summary=.* must contain updates, .*; remove it, and let `distill train"
        ):
            folder.read_summary()
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(ConfigError, match=r"run=.*run.json must be JSON .*; start the run again"):
            _ = folder.run_id


def test_a_failure_is_kept_as_data_with_its_traceback(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_failure() is None
    try:
        raise Diverged("the student's loss", float("nan"), "be finite", "lower the rate").within("learner")
    except Diverged as error:
        folder.write_failure(error)
    assert folder.read_failure() == {
        "code": "diverged",
        "name": "learner: the student's loss",
        "value": "nan",
        "must": "be finite",
        "remedy": "lower the rate",
        "message": "learner: the student's loss=nan must be finite; lower the rate",
    }
    assert "test_folder.py" in (kept := folder.traceback.read_text()) and kept.startswith("Traceback")
    assert "learner: the student's loss=nan must be finite" in kept
    folder.write_failure(OSError(28, "No space left on device"))
    assert folder.read_failure() == {
        "code": "unexpected",
        "message": "OSError: [Errno 28] No space left on device",
    }
    assert "Diverged" not in folder.traceback.read_text()


def test_a_traceback_contains_the_one_below_it(tmp_path):
    folder = RunFolder(tmp_path)
    try:
        try:
            raise ZeroDivisionError("in the actor")
        except ZeroDivisionError as below:
            raise RuntimeError("in the driver") from below
    except RuntimeError as error:
        folder.write_failure(error)
    kept = folder.traceback.read_text()
    assert kept.index("in the actor") < kept.index("in the driver")


def test_a_new_incarnation_removes_the_old_failure(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.create("a", "abc")
        folder.write_failure(OSError("full"))
    with RunFolder(tmp_path) as folder:
        folder.create("a", "abc")
        assert folder.read_failure() is None
        assert not folder.failure.exists() and not folder.traceback.exists()


def test_new_incarnation_removes_what_dead_writers_left(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.create("a", "abc")
    parts = (folder.path, folder.data, folder.checkpoints, folder.evaluations)
    for part in parts:
        part.mkdir(exist_ok=True)
        (part / ".step-1.1-0.tmp").mkdir()
        (part / ".step-1.1-0.tmp" / "shard").write_text("half")
        (part / ".a.parquet.1-1.tmp").write_text("half")
        (part / "whole").write_text("kept")
    with RunFolder(tmp_path) as folder:
        folder.create("a", "abc")
        for part in parts:
            assert not list(part.glob(".*.tmp"))
            assert (part / "whole").exists()


def test_folder_in_use_keeps_its_unfinished_files(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.create("a", "abc")
        folder.checkpoints.mkdir()
        writing = folder.checkpoints / ".step-1.1-0.tmp"
        writing.mkdir()
        with pytest.raises(ConfigError, match="one process at a time"):
            RunFolder(tmp_path).create("a", "abc")
        assert writing.exists()


# Memory of process trees


TREE = """
import subprocess, sys, time
data = bytearray(b"x" * (40 << 20))
if sys.argv[1] == "parent":
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2], "child", sys.argv[2]], stdout=subprocess.PIPE, text=True)
    print(child.stdout.readline().strip(), flush=True)
else:
    import os
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_tree_counts_once_and_is_followed_after_its_root_dies():
    with start(TREE, "parent", TREE) as parent:
        child = int(parent.stdout.readline())
        try:
            own = MemorySampler({"tree": parent.pid})
            split = MemorySampler({"driver": parent.pid, "learner": child})
            assert own.sample()["tree"] > 80 << 20
            found = split.sample()
            assert 40 << 20 < found["driver"] < 75 << 20
            assert 40 << 20 < found["learner"] < 75 << 20
            assert found["total"] == found["driver"] + found["learner"]
            parent.kill()
            parent.wait()
            assert 40 << 20 < own.sample()["tree"] < 75 << 20
            assert own.peaks()["tree"] > 80 << 20
        finally:
            os.kill(child, signal.SIGKILL)
    assert pss_bytes(parent.pid) == 0


def test_the_sampler_runs_until_it_is_stopped_and_keeps_the_peak():
    with MemorySampler({"self": os.getpid()}, interval_s=0.02) as sampler:
        data = bytearray(b"x" * (60 << 20))
        with_data = sampler.sample()["self"]
        del data
        peaks = sampler.stop()
    assert peaks["self"] >= with_data
    assert peaks["total"] == peaks["self"]
    with pytest.raises(ValueError, match="name=total"):
        sampler.add("total", 1)
