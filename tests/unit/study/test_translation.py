"""Parsing dictionary entries, and separating training pairs from prompts."""

from __future__ import annotations

import pytest

from deploy.fetch import FetchError
from deploy.study.tasks import tiny_translation as task

LINES = """# Version :: 1
Er kommt {v} heute nicht [ugs.]; er bleibt weg | Sie kommt aber doch :: He will not come today; he stays | She comes all the same
kurz :: short
eins zwei drei | vier fünf sechs :: only one side here
das und/oder dies eben :: this and or that
Wir gehen heute Abend noch ins Kino :: We are going to the cinema tonight
"""


def test_entries_are_the_first_alternatives_without_notes():
    assert list(task._entries(LINES)) == [
        ("Er kommt heute nicht", "He will not come today"),
        ("Sie kommt aber doch", "She comes all the same"),
        ("Wir gehen heute Abend noch ins Kino", "We are going to the cinema tonight"),
    ]


def test_no_german_side_is_in_both_training_and_prompts(monkeypatch):
    monkeypatch.setattr(task, "NUM_PROMPTS", 2)
    long = "eins zwei drei vier fünf sechs"
    pairs = [(long, "one two three four five six"), ("kurz und gut", "short and good"),
             (long, "another six words for the same"), (long + " sieben", "one two three four five six seven")]  # fmt: skip
    train, prompts = task._split(pairs)
    assert [german for german, _ in prompts] == [long, long + " sieben"]
    assert train == [("kurz und gut", "short and good")]


def test_without_apt_the_error_names_the_place_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        FetchError,
        match=r"^trans-de-en: apt-get download trans-de-en must succeed \(.*apt-get.*\); run apt-get update, "
        rf"or put the package's \S+ at {tmp_path}/data/de-en$",
    ):
        task._dictionary(lambda text: None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "de-en").write_text(LINES)
    messages = []
    assert task._dictionary(messages.append) == LINES
    assert "another version" in messages[0]
