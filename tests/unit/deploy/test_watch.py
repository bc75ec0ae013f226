"""Following a run from its folder."""

from __future__ import annotations

import fcntl
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from deploy.report import watch
from deploy.report.run_files import read_run
from deploy.report.watch import HOST, Watch, follow, how_it_stands, live_line, serve
from deploy.run.progress import Progress
from distill.errors import ConfigError
from distill.files import write_json
from distill.run.folder import RunFolder
from tests.unit.deploy.run_folders import HOSTILE, run_folder, write_events


@contextmanager
def running(folder: RunFolder) -> Iterator[None]:
    """Another process trains in the folder."""
    with open(folder.path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_the_line_is_that_of_the_last_updates(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    folder.summary.unlink()
    with running(folder):
        run = read_run(folder.path)
        assert how_it_stands(run) is None
        line = live_line(run)
    assert line.startswith("update 60/60 | ")
    assert "limit " in line and "ETA 0:00" in line


def test_a_run_without_rows_has_a_line(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    folder.metrics.unlink()
    assert live_line(read_run(folder.path)) == "update 0/60 | policy age 0 | ETA -"


def test_news_is_shown_once_and_is_safe(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    look = Watch(str(folder.path))
    assert list(look.news()) == [
        "evaluation before: not measured",
        "update 30: warning: critic/teacher_text.tightness is 0.40",
    ]
    assert list(look.news()) == []
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    new = [
        {"at": 9, "event": "alarm", "update": 50, "message": HOSTILE},
        {"at": 9, "event": "evaluated", "label": "step-50", "teacher_text": {"tv": 0.25}},
    ]
    old = folder.events.read_text()
    write_events(folder, new)
    folder.events.write_text(old + folder.events.read_text())
    assert len(events) + 2 == len(folder.events.read_text().splitlines())
    look.look()
    alarm, evaluated = look.news()
    assert alarm.startswith("update 50: warning: <script>") and "\x1b" not in alarm and "\u202e" not in alarm
    assert evaluated == "evaluation step-50: TV 0.2500 on the teacher's text"


@pytest.mark.parametrize("state", ["ended", "failed", "stands"])
def test_a_run_that_does_not_train_is_said_to_be_so(tmp_path: Path, state: str) -> None:
    folder = run_folder(tmp_path / "run")
    if state != "ended":
        folder.summary.unlink()
    if state == "failed":
        folder.write_failure(ConfigError("learner.learning_rate", 9, "be <= 1", "lower it"))
    out = io.StringIO()
    with Progress(Console(file=out, width=500)) as progress:
        follow(str(folder.path), progress)
    last = out.getvalue().splitlines()[-1]
    expected = {
        "ended": "the run has ended after 60 updates",
        "failed": "the run has failed: learner.learning_rate=9 must be <= 1",
        "stands": "the run stands at update 60; resume with: distill train --resume",
    }
    assert expected[state] in last


def test_it_follows_until_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "run")
    summary = folder.summary.read_text()
    folder.summary.unlink()
    out = io.StringIO()
    with running(folder):
        looks: list[float] = []

        def end(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 2:
                folder.summary.write_text(summary)
                monkeypatch.setattr(RunFolder, "is_running", False)

        monkeypatch.setattr(watch.time, "sleep", end)
        with Progress(Console(file=out, width=500)) as progress:
            follow(str(folder.path), progress)
    assert len(looks) == 2
    text = out.getvalue()
    assert "update 60/60" in text and text.rstrip().endswith("the run has ended after 60 updates")


@contextmanager
def served(folder: RunFolder) -> Iterator[str]:
    with serve(str(folder.path), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_the_report_is_served_anew_for_each_request(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with served(folder) as address:
        with urllib.request.urlopen(address) as answer:
            assert answer.headers["Refresh"] is None  # it has ended
            assert "0a1b2c3d" in answer.read().decode()
        identity = json.loads((folder.path / "run.json").read_text())
        write_json(folder.path / "run.json", identity | {"run_id": "99999999"})
        with running(folder), urllib.request.urlopen(address) as answer:
            assert answer.headers["Refresh"] == str(watch.REFRESH_EVERY_S)
            assert "99999999" in answer.read().decode()


@pytest.mark.parametrize(("path", "host", "code"), [("/run.json", None, 404), ("/", "evil.example", 403)])
def test_nothing_else_is_served(tmp_path: Path, path: str, host: str | None, code: int) -> None:
    with served(run_folder(tmp_path / "run")) as address:
        request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        caught.value.close()
        assert caught.value.code == code


def test_a_taken_port_and_a_folder_that_is_no_run_are_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with served(folder) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"--port={port} must be a free port"):
            serve(str(folder.path), port)
    for start in (lambda: serve(str(tmp_path), 0), lambda: Watch(str(tmp_path))):
        with pytest.raises(ConfigError, match="run_dir"):
            start()
