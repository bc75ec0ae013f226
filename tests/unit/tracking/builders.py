"""Runs and trackers for tests: one that keeps what it is given, one that waits, and one that raises."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from deploy.run.tracking.kinds import start_trackers
from deploy.run.tracking.trackers import Trackers
from deploy.run.training.advice import Setup
from deploy.run.training.recorder import Recorder
from deploy.run.training.tracing import RunTrace
from distill.config import RunConfig
from distill.config.tree import flatten
from distill.evaluation import EXTRA_METRICS, METRICS, Evaluation
from distill.run.alarms import Alarms
from distill.run.folder import RunFolder
from distill.run.metrics import read_metrics

WAIT_S = 60.0
"""Longest wait for a thread; a test that reaches it fails."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what a thread does."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.numbers: list[tuple[int, Mapping[str, float]]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.failed: bool | None = None

    def log_numbers(self, update: int, numbers: Mapping[str, float]) -> None:
        self.numbers.append((update, numbers))

    def log_text(self, update: int, name: str, text: str) -> None:
        self.texts.append((update, name, text))

    def close(self, *, failed: bool) -> None:
        self.failed = failed

    @property
    def updates(self) -> list[int]:
        return [update for update, _ in self.numbers]


class Waiting(Kept):
    """A tracker whose calls wait until its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.gate = threading.Event()

    def log_numbers(self, update: int, numbers: Mapping[str, float]) -> None:
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        super().log_numbers(update, numbers)


class Raising(Kept):
    """A tracker that raises in one of its methods. ``when``: the method's name."""

    def __init__(self, when: str, error: BaseException) -> None:
        super().__init__()
        self._when, self._error = when, error
        self.raised = threading.Event()
        self._raise_in("open")

    def _raise_in(self, method: str) -> None:
        if method == self._when:
            self.raised.set()
            raise self._error

    def log_numbers(self, update: int, numbers: Mapping[str, float]) -> None:
        self._raise_in("log_numbers")
        super().log_numbers(update, numbers)

    def log_text(self, update: int, name: str, text: str) -> None:
        self._raise_in("log_text")
        super().log_text(update, name, text)

    def close(self, *, failed: bool) -> None:
        super().close(failed=failed)
        self._raise_in("close")


def evaluation(label: str, loss: float) -> Evaluation:
    """Four prompts of ten tokens; every metric differs between prompts."""
    columns: dict[str, Any] = {"prompt_index": np.arange(4)}
    for place, name in enumerate((*METRICS, *EXTRA_METRICS)):
        columns[f"{name}.sum"] = 10 * (loss + place + np.array([0.5, -0.5, 3.0, 4.0]))
        columns[f"{name}.weight"] = np.full(4, 10.0)
    return Evaluation(label, pa.table(columns))


def row(update: int, salt: float = 0.0) -> dict[str, float]:
    """The numbers of an update. The critic is trained from the third update on, and one number is not finite."""
    numbers = {"learner/loss": 1 / (update + salt + 3), "rollout/num_tokens": 1e5 * update + salt}
    if update >= 3:
        numbers["critic/teacher_text.d_mm"] = 0.1 * update
    numbers["policy/student_text.tv"] = float("nan") if update == 2 else 0.3
    return numbers


@contextmanager
def recording(
    folder: RunFolder, config: RunConfig, updates_done: int, say: Callable[[str], None] = print
) -> Iterator[tuple[Recorder, Trackers]]:
    """One start of a run in ``folder``, with its recorder and trackers."""
    setup = Setup(max_policy_age=0, num_cores=2, num_threads={})
    with folder, start_trackers(config, folder, updates_done, say) as trackers:
        trace = RunTrace(folder, say)
        recorder = Recorder(
            folder, Alarms(), lambda **_: None, setup, trackers, trace, {"student_text": 1, "teacher_text": 1}
        )
        try:
            recorder.start(updates_done)
            recorder.note_start(updates_done, policy_version=updates_done)
            yield recorder, trackers
        finally:
            recorder.close()
            trace.close()


def record_updates(recorder: Recorder, updates: range, salt: float = 0.0) -> None:
    """Record updates, with an evaluation before the first and after every second one."""
    lease: Any = SimpleNamespace(policy_ages=[0, 1], groups=[])
    if updates.start == 1:
        recorder.measured(0, evaluation("before", 2.0))
    for update in updates:
        recorder.note_draws(update, lease)
        recorder.update(update, update, lease, row(update, salt))
        if update % 2 == 0:
            recorder.measured(update, evaluation(f"step-{update}", 2 - update / 10 + salt))


def new_run(path: Path) -> RunFolder:
    """A run folder that was just taken."""
    folder = RunFolder(path)
    folder.create("", "fingerprint")
    return folder


def interrupted_and_resumed(path: Path, config: RunConfig, say: Callable[[str], None] = print) -> RunFolder:
    """A run that was interrupted after update 5 and resumed after update 3, with other numbers from there on."""
    folder = new_run(path)
    with recording(folder, config, 0, say) as (recorder, trackers):
        record_updates(recorder, range(1, 6))
        trackers.log_text(5, "alarm", "superseded")
    folder.create("", "fingerprint")
    with recording(folder, config, 3, say) as (recorder, trackers):
        record_updates(recorder, range(4, 8), salt=0.25)
        trackers.log_text(7, "alarm", "the critic is too weak")
    return folder


def expected_numbers(folder: RunFolder) -> dict[str, dict[int, float]]:
    """The finite numbers of ``metrics.parquet`` and of the evaluations: name -> update -> value."""
    table = read_metrics(folder.path)
    updates = table["update"].to_pylist()
    found = {
        name: {
            update: value
            for update, value in zip(updates, table[name].to_pylist(), strict=True)
            if value is not None and math.isfinite(value)
        }
        for name in table.column_names
        if name != "update"
    }
    for update, measured in (
        (0, evaluation("before", 2.0)),
        (2, evaluation("step-2", 1.8)),
        (4, evaluation("step-4", 1.85)),
        (6, evaluation("step-6", 1.65)),
    ):
        for name, value in flatten(measured.to_dict()).items():
            if value is not None:
                found.setdefault(f"evaluation/{name}", {})[update] = value
    return found
