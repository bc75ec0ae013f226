"""Writes are complete or absent, however the writer ends."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from distill import files
from distill.files import (
    LineReader,
    is_temporary,
    new_folder,
    plain,
    put_folder,
    replacing_file,
    whole_number,
    write_bytes,
    write_json,
)


class Crash(BaseException):
    """An exception that `except Exception` does not catch, like KeyboardInterrupt and SystemExit."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "text").write_text(text)
    return folder


# Files


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "a"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("error", [OSError, Crash])
def test_an_exception_inside_leaves_the_old_file(tmp_path, error, durable):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), replacing_file(path, durable=durable) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path and is_temporary(temporary.name)
        raise error("full")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_an_exception_before_anything_is_written(tmp_path):
    with pytest.raises(Crash), replacing_file(tmp_path / "a"):
        raise Crash
    assert names(tmp_path) == []


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError), replacing_file(tmp_path / "a") as temporary:
        temporary.write_text("a file")
    assert names(tmp_path) == ["a"]


def test_durable_data_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    seen: list[tuple[str, bool]] = []
    path = tmp_path / "a"
    monkeypatch.setattr(files, "sync", lambda file: seen.append((file.name, path.exists())))
    with replacing_file(path) as temporary:
        temporary.write_text("new")
    assert seen == [(temporary.name, False), (tmp_path.name, True)]
    seen.clear()
    with replacing_file(path, durable=False) as temporary:
        temporary.write_text("newer")
    assert seen == [] and path.read_text() == "newer"


def test_two_writers_of_one_file_do_not_interfere(tmp_path):
    path = tmp_path / "a"
    with replacing_file(path) as first, replacing_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the writer that ends last wins"
    assert names(tmp_path) == ["a"]


# Folders


@pytest.mark.parametrize("if_exists", ["replace", "keep"])
def test_a_new_folder_appears_when_it_is_filled(tmp_path, if_exists):
    place = tmp_path / "new" / "place"
    with new_folder(place, if_exists=if_exists) as making:
        assert names(making) == [] and is_temporary(making.name) and making.parent == place.parent
        filled(making / "deep", "new")
        assert not place.exists()
    assert (place / "deep" / "text").read_text() == "new"
    assert names(place.parent) == ["place"]


@pytest.mark.parametrize(("if_exists", "left"), [("replace", "new"), ("keep", "old")])
def test_an_existing_folder_is_replaced_or_kept(tmp_path, if_exists, left):
    place = filled(tmp_path / "place", "old")
    with new_folder(place, if_exists=if_exists) as making:
        (making / "text").write_text("new")
        assert (place / "text").read_text() == "old"
    assert (place / "text").read_text() == left
    assert names(tmp_path) == ["place"]


def test_replacing_is_the_default(tmp_path):
    place = filled(tmp_path / "place", "old")
    with new_folder(place):
        pass
    assert names(place) == []


@pytest.mark.parametrize(("if_exists", "left"), [("replace", "new"), ("keep", "meanwhile")])
def test_a_folder_that_appears_meanwhile(tmp_path, if_exists, left):
    with new_folder(tmp_path / "place", if_exists=if_exists) as making:
        (making / "text").write_text("new")
        filled(tmp_path / "place", "meanwhile")
    assert (tmp_path / "place" / "text").read_text() == left
    assert names(tmp_path) == ["place"]


@pytest.mark.parametrize("if_exists", ["replace", "keep"])
@pytest.mark.parametrize("error", [OSError, Crash])
@pytest.mark.parametrize("there", [True, False])
def test_an_exception_inside_changes_nothing(tmp_path, if_exists, error, there):
    if there:
        filled(tmp_path / "place", "old")
    with pytest.raises(error), new_folder(tmp_path / "place", if_exists=if_exists) as making:
        filled(making / "deep", "half")
        raise error("full")
    assert names(tmp_path) == (["place"] if there else [])
    assert not there or (tmp_path / "place" / "text").read_text() == "old"


@pytest.mark.parametrize("if_exists", ["replace", "keep"])
def test_a_rename_that_fails_changes_nothing(tmp_path, monkeypatch, if_exists):
    """This includes the second of the two renames that replace a folder where names cannot be exchanged."""
    monkeypatch.setattr("distill.files.ctypes.CDLL", without_exchange)
    place = filled(tmp_path / "place", "old") if if_exists == "replace" else tmp_path / "place"
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == place and (path / "text").read_text() == "new":
            raise OSError("full")
        return rename(path, target)

    with pytest.raises(OSError, match="full"), new_folder(place, if_exists=if_exists) as making:
        (making / "text").write_text("new")
        monkeypatch.setattr(Path, "rename", fail)
    assert names(tmp_path) == (["place"] if if_exists == "replace" else [])
    assert if_exists == "keep" or (place / "text").read_text() == "old"


def without_exchange(name: None, *, use_errno: bool) -> object:
    return object()


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.files.ctypes.CDLL", without_exchange)
    place = filled(tmp_path / "place", "old")
    with new_folder(place) as making:
        (making / "text").write_text("new")
    assert (place / "text").read_text() == "new"
    assert names(tmp_path) == ["place"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux exchanges names")
def test_a_folder_that_is_replaced_is_never_absent(tmp_path, monkeypatch):
    """The names are exchanged in one step. Nothing is renamed, which would leave its old name free for a moment."""
    place = filled(tmp_path / "place", "old")
    monkeypatch.delattr(Path, "rename")
    monkeypatch.delattr("os.rename")
    monkeypatch.delattr("os.replace")
    with new_folder(place) as making:
        (making / "text").write_text("new")
    assert (place / "text").read_text() == "new"
    assert names(tmp_path) == ["place"]


def test_a_file_where_a_kept_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "place").write_text("a file")
    with pytest.raises(OSError), new_folder(tmp_path / "place", if_exists="keep"):
        pass
    assert names(tmp_path) == ["place"]


def test_a_finished_folder_is_renamed_or_deleted(tmp_path):
    place = tmp_path / "place"
    for number in (1, 2):
        made = filled(tmp_path / f"made-{number}", str(number))
        put_folder(made, place, if_exists="keep")
        assert not made.exists()
    assert (place / "text").read_text() == "1"
    put_folder(filled(tmp_path / "made-3", "3"), place, if_exists="replace")
    assert (place / "text").read_text() == "3"
    assert names(tmp_path) == ["place"]
    made = filled(tmp_path / "made-4", "4")
    for if_exists in ("keep", "replace"):
        with pytest.raises(OSError):
            put_folder(made, tmp_path / "nowhere" / "place", if_exists=if_exists)
    assert (made / "text").read_text() == "4"


@pytest.mark.parametrize("if_exists", ["replace", "keep"])
def test_a_folders_contents_reach_the_disk_before_its_name(tmp_path, monkeypatch, if_exists):
    place, seen = tmp_path / "place", []
    monkeypatch.setattr(files, "sync", lambda path: seen.append((path, place.exists())))
    with new_folder(place, if_exists=if_exists) as making:
        filled(making / "deep", "new")
    before = {path for path, there in seen if not there}
    assert before == {making, making / "deep", making / "deep" / "text"}
    assert seen[-1] == (tmp_path, True)


# JSON


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (float("-inf"), None),
        (1.5, 1.5),
        (True, True),
        (None, None),
        ("nan", "nan"),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64("nan"), None),
        (np.bool_(True), True),
        (np.array([[1.0, np.inf], [np.nan, 2.0]]), [[1.0, None], [None, 2.0]]),
        (np.array(7), 7),
        (Path("/a/b"), "/a/b"),
        ((1, [np.int8(2), (float("inf"),)]), [1, [2, [None]]]),
        ({"a": {1: np.float16("nan")}, Path("p"): (Path("q"),)}, {"a": {"1": None}, "p": ["q"]}),
    ],
)
def test_plain(value, expected):
    found = plain(value)
    assert found == expected and type(found) is type(expected)
    json.dumps(found, allow_nan=False)


def test_numbers_that_json_cannot_represent_become_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"tv": float("nan"), "n": np.int64(3), "pair": (1.5, np.float32("inf")), "at": tmp_path})
    text = path.read_text()
    assert json.loads(text) == {"tv": None, "n": 3, "pair": [1.5, None], "at": str(tmp_path)}
    assert text.endswith("}\n") and "NaN" not in text and "Infinity" not in text


def test_lines_that_are_not_as_written_are_counted_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(
        b'{"n": 1}\n\xff\xfe\n{"m": 1}\n\n[]\n{"n": 2\n{"n": "3"}\n{"n": 9007199254740992}\n{"n": 4}\n'
    )
    reader = LineReader(path, lambda line: [whole_number(line["n"])])
    assert (list(reader), reader.num_broken) == ([1, 4], 6)
    assert (list(reader), reader.num_broken) == ([1, 4], 6)  # a second reading counts anew


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 1 << 53, -(1 << 53)])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(ValueError, match="must be a whole number"):
        whole_number(value)
