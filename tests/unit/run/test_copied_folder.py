"""A copy of a run folder is another run, and a folder that was moved is the same one."""

from __future__ import annotations

import json
import shutil

import pytest

from distill.files import write_json
from distill.run.folder import RunFolder


def begin(path):
    """Start the run in a folder once more; returns its id."""
    with RunFolder(path) as folder:
        folder.create("a", "abc")
        return folder.run_id


def identity_in(path):
    return json.loads((path / "run.json").read_text())


def test_a_copy_gets_an_id_of_its_own_and_both_resume(tmp_path):
    original, copy = tmp_path / "a", tmp_path / "b"
    first = begin(original)
    shutil.copytree(original, copy, copy_function=shutil.copy2)  # times are kept, as by `cp -a`
    with RunFolder(original) as one, RunFolder(copy) as two:  # at once
        one.create("a", "abc")
        assert two.create("a", "abc") is True
        assert one.run_id == first != two.run_id
        assert (one.found_copy_of, two.found_copy_of) == (None, first)
        assert (one.incarnation, two.incarnation) == (2, 2)
        second = two.run_id
    assert identity_in(copy)["copied_from"] == first and "copied_from" not in identity_in(original)
    assert (begin(original), begin(copy)) == (first, second)
    assert identity_in(copy)["copied_from"] == first


def test_a_copy_of_a_copy_names_the_run_it_was_copied_from(tmp_path):
    begin(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = begin(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    third = begin(tmp_path / "c")
    assert third != second and identity_in(tmp_path / "c")["copied_from"] == second


def test_a_moved_folder_keeps_its_id_even_if_a_copy_takes_its_place(tmp_path):
    first = begin(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert begin(tmp_path / "moved") == first
    shutil.copytree(tmp_path / "moved", tmp_path / "a")
    assert begin(tmp_path / "a") != first
    assert begin(tmp_path / "moved") == first


def test_a_copy_that_is_made_while_the_run_trains(tmp_path):
    with RunFolder(tmp_path / "a") as folder:
        folder.create("a", "abc")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert begin(tmp_path / "b") != folder.run_id


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"device": -1}, True),  # a network file system, mounted again
        ({"path": "/elsewhere"}, True),  # moved
        ({"device": -1, "path": "/elsewhere"}, False),  # another disk
        ({"inode": -1}, False),
    ],
)
def test_what_a_folder_is_known_by(tmp_path, change, is_same):
    first = begin(tmp_path)
    identity = identity_in(tmp_path)
    write_json(tmp_path / "run.json", identity | {"folder": identity["folder"] | change})
    assert (begin(tmp_path) == first) is is_same


@pytest.mark.parametrize("folder", [None, [], {}, "x"])
def test_a_broken_place_gives_a_new_id(tmp_path, folder):
    first = begin(tmp_path)
    write_json(tmp_path / "run.json", identity_in(tmp_path) | {"folder": folder})
    assert begin(tmp_path) != first


def test_a_run_of_an_earlier_version_keeps_its_id(tmp_path):
    first = begin(tmp_path / "a")
    identity = identity_in(tmp_path / "a")
    del identity["folder"]
    write_json(tmp_path / "a" / "run.json", identity)
    assert begin(tmp_path / "a") == first
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert begin(tmp_path / "b") != first
