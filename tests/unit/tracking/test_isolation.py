"""A tracker that is slow, fails or hangs changes nothing for the run and for the other trackers."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from deploy.run.tracking.tracker import Tracker
from deploy.run.tracking.trackers import Trackers
from distill.run.metrics import EventLog, read_events
from tests.unit.tracking.builders import WAIT_S, Kept, Raising, Waiting, wait_until


class Watched:
    """Trackers with what they say, report and request."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        self.num_requests = 0
        self._folder = folder

    def start(self, openers: Mapping[str, Callable[[], Tracker]], **options: float) -> Trackers:
        return Trackers(
            openers, self.said.append, EventLog(self._folder), leave_at_once=self._request, **options
        )  # type: ignore[arg-type]

    def _request(self) -> None:
        self.num_requests += 1

    def events(self, name: str) -> list[dict]:
        return [event for event in read_events(self._folder) if event["event"] == name]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_finite_numbers_and_texts_arrive_in_their_order(watched: Watched) -> None:
    kept = Kept()
    with watched.start({"kept": lambda: kept}) as trackers:
        trackers.log_numbers(1, {"a": 1, "b": float("nan"), "c": None, "d": float("inf")})
        trackers.log_text(1, "alarm", "weak")
        trackers.log_numbers(2, {"a": 0.5})
    assert kept.numbers == [(1, {"a": 1.0}), (2, {"a": 0.5})]
    assert kept.texts == [(1, "alarm", "weak")]
    assert kept.failed is False
    assert (watched.said, watched.num_requests) == ([], 0)
    (closed,) = watched.events("tracker_closed")
    assert (closed["tracker"], closed["ended"], closed["num_dropped"]) == ("kept", True, 0)


def test_a_run_without_trackers_starts_no_thread(watched: Watched) -> None:
    before = threading.active_count()
    with watched.start({}) as trackers:
        trackers.log_numbers(1, {"a": 1.0})
        trackers.report()
        assert threading.active_count() == before
    assert watched.said == []


def test_a_slow_tracker_holds_nothing_up_and_its_rows_beyond_the_queue_are_counted(watched: Watched) -> None:
    slow, kept = Waiting(), Kept()
    with watched.start({"slow": lambda: slow, "kept": lambda: kept}, queue_length=3) as trackers:
        trackers.log_numbers(1, {"a": 1.0})
        assert slow.entered.wait(WAIT_S)
        for update in range(2, 12):  # returns while the slow tracker is in its first call
            trackers.log_numbers(update, {"a": 1.0})
            trackers.report()
            wait_until(lambda update=update: len(kept.numbers) == update)  # the other has its own queue
        assert slow.numbers == []
        assert watched.said == [
            "warning: tracker slow does not keep up; it lacks rows that metrics.parquet has"
        ]
        slow.gate.set()
    assert slow.updates == [1, 2, 3, 4]
    assert kept.updates == list(range(1, 12))
    assert {event["tracker"]: event["num_dropped"] for event in watched.events("tracker_closed")} == {
        "slow": 7,
        "kept": 0,
    }
    assert len(watched.said) == 1 and watched.num_requests == 0


@pytest.mark.parametrize("error", [RuntimeError("no route to host\nat line 3"), SystemExit(1)])
@pytest.mark.parametrize("when", ["open", "log_numbers", "log_text", "close"])
def test_a_tracker_that_raises_ends_alone(watched: Watched, when: str, error: BaseException) -> None:
    kept, made = Kept(), []

    def open_raising() -> Raising:
        raising = Raising.__new__(Raising)
        made.append(raising)
        raising.__init__(when, error)
        return raising

    with watched.start({"raising": open_raising, "kept": lambda: kept}) as trackers:
        for update in (1, 2, 3):
            trackers.log_numbers(update, {"a": 1.0})
            trackers.log_text(update, "alarm", "weak")
            trackers.report()
    assert kept.updates == [1, 2, 3] and len(kept.texts) == 3 and kept.failed is False
    reason = "no route to host" if isinstance(error, RuntimeError) else "1"
    assert watched.said == [
        f"warning: tracker raising has failed and gets no more numbers of this run ({reason})"
    ]
    (failed,) = watched.events("tracker_failed")
    assert (failed["tracker"], failed["reason"]) == ("raising", reason)
    assert watched.num_requests == 1
    (raising,) = made
    assert raising.failed is {"open": None, "close": False}.get(when, True)


def test_what_a_failed_tracker_misses_is_not_kept_in_memory(watched: Watched) -> None:
    raising = Raising("log_numbers", RuntimeError("down"))
    with watched.start({"raising": lambda: raising}, queue_length=2) as trackers:
        trackers.log_numbers(1, {"a": 1.0})
        (thread,) = trackers._threads
        assert thread.join(WAIT_S)
        for update in range(2, 50):
            trackers.log_numbers(update, {"a": 1.0})
        assert thread.num_waiting == 0 and thread.num_dropped == 0


def test_a_tracker_that_never_returns_is_left_behind(watched: Watched) -> None:
    hanging, kept = Waiting(), Kept()
    with watched.start({"hanging": lambda: hanging, "kept": lambda: kept}, close_s=0.05) as trackers:
        trackers.log_numbers(1, {"a": 1.0})
        trackers.log_numbers(2, {"a": 1.0})
        assert hanging.entered.wait(WAIT_S)
    assert kept.updates == [1, 2] and kept.failed is False
    (line,) = watched.said
    assert line.startswith("warning: tracker hanging did not finish within 0 s and may lack the last numbers")
    assert watched.num_requests == 1
    assert {event["tracker"]: event["ended"] for event in watched.events("tracker_closed")} == {
        "hanging": False,
        "kept": True,
    }
    hanging.gate.set()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_trackers_learn_that_a_run_has_not_ended_well(watched: Watched, error: type[BaseException]) -> None:
    kept = Kept()
    with pytest.raises(error), watched.start({"kept": lambda: kept}) as trackers:
        trackers.log_numbers(1, {"a": 1.0})
        raise error
    assert kept.updates == [1] and kept.failed is True


def test_credentials_are_not_printed(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "open sesame")
    text = "401 for 0123456789abcdef at https://me:open%20sesame@host/api with open sesame"

    def refuse() -> Kept:
        raise RuntimeError(text)

    with watched.start({"refusing": refuse}):
        pass
    (line,) = watched.said
    assert "401 for *** at https://***@host/api with ***" in line
    assert watched.events("tracker_failed")[0]["reason"] in line


SCRIPT = """
import atexit, sys, threading
from deploy.exits import leave, leave_at_once
from deploy.run.tracking.trackers import Trackers
from distill.run.metrics import EventLog

forever = threading.Event()

class Hanging:
    def __init__(self):
        threading.Thread(target=forever.wait).start()  # as a library does that waits for its uploads
        atexit.register(forever.wait)

    def log_numbers(self, update, numbers):
        if sys.argv[2] == "raises":
            raise RuntimeError("down")
        forever.wait()

    def close(self, *, failed):
        pass

with Trackers({"hanging": Hanging}, print, EventLog(sys.argv[1]), leave_at_once=leave_at_once, close_s=0.3) as trackers:
    trackers.log_numbers(1, {"a": 1.0})
sys.exit(leave(3))
"""


@pytest.mark.parametrize("what", ["hangs", "raises"])
def test_the_process_ends_although_a_library_waits_for_its_server(tmp_path: Path, what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), what], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 3, done.stderr
    (line,) = done.stdout.splitlines()
    assert ("did not finish" if what == "hangs" else "has failed") in line
