"""A run of `distill train` whose processes a test kills and stops.

A victim is chosen by its name in the run's own events and by its state, because a looser choice would silently change
what is tested.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from actors.vllm_engine.processes import is_alive
from distill.run.metrics import read_events, read_metrics
from tests.integration.test_train import start, train_arguments

ENGINE_CORE = re.compile("EngineCore")
HELPERS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def ended_within(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Wait for the end of some processes for some seconds at most. Raises: AssertionError when one still lives then."""
    end = time.monotonic() + seconds
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < end, [process.cmdline()[:3] for process in alive]
        time.sleep(0.1)


class Victims:
    """The processes of one run, which ends with the context."""

    def __init__(self, world: Path, name: str, *settings: str) -> None:
        self.run = world / name
        self._world = world
        self._num_replaced = 0
        self._num_starts = 0
        self._helpers: list[psutil.Process] = []
        """Those of Ray."""
        self._start(train_arguments(world, name, *settings))

    def _start(self, arguments: Sequence[str]) -> None:
        self._num_starts += 1
        # A file, because a full pipe would stop a long run.
        self._output = self._world / f"{self.run.name}-{self._num_starts}.log"
        with self._output.open("w") as output:
            self.driver = start(self._world, *arguments, output=output)

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *_: object) -> None:
        if self.driver.poll() is None:
            self.driver.send_signal(signal.SIGINT)
            try:
                self.driver.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.driver.kill()
                self.driver.wait()

    @property
    def output(self) -> str:
        """What the run has printed since its last start."""
        return self._output.read_text()

    def wait(self, timeout_s: float, exit_code: int) -> str:
        """Wait for the end of the run; returns what it printed."""
        self.driver.wait(timeout=timeout_s)
        assert self.driver.returncode == exit_code, self.output[-4000:]
        return self.output

    def finish(self, timeout_s: float = 300) -> str:
        """Wait for the end of a run that succeeds; returns what it printed."""
        output = self.wait(timeout_s, exit_code=0)
        ended_within(self._helpers, 120.0)
        return output

    def resume(self, *settings: str) -> None:
        """Start the run again after its end."""
        assert self.driver.poll() is not None
        self._start(["train", "--resume", str(self.run), *settings])

    def kill_driver(self) -> str:
        """Kill the driver, and check that its actors, engines and Ray end by themselves; returns what it printed."""
        family = self.family()
        self.driver.kill()
        self.driver.wait(timeout=30)
        ended_within(family, 15.0)
        return self.output

    def family(self) -> list[psutil.Process]:
        """The processes that have to end within seconds when the run ends in whatever way.

        Two helpers of Ray wait for a minute for its control store; :meth:`finish` checks that they have ended.
        """
        family = psutil.Process(self.driver.pid).children(recursive=True)
        self._helpers += [each for each in family if each.cmdline()[0] in HELPERS]
        others = [each for each in family if each not in self._helpers]
        assert len(others) > 5
        return others

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run) if event["event"] == name]

    def stages(self) -> set[str]:
        """The stages that have started."""
        return {event["stage"] for event in self.events("stage_started")}

    def has_started(self, role_and_number: str) -> bool:
        """Whether an actor with this role and number has started."""
        return any(
            event["actor"].partition(".")[0] == role_and_number for event in self.events("actor_started")
        )

    def until(self, condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
        """Wait until a condition holds while the run goes on; returns its value."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            if self.driver.poll() is not None:
                raise AssertionError(self.output[-4000:])
            assert time.monotonic() < end, self.output[-4000:]
            time.sleep(0.05)
        return found

    def last_update(self) -> int:
        """The newest update in the file of metrics; 0 before the first."""
        done = read_metrics(self.run)["update"].to_pylist() if (self.run / "run.json").exists() else []
        return done[-1] if done else 0

    def until_update(self, update: int) -> None:
        """Wait until the file of metrics has this update."""
        self.until(lambda: self.last_update() >= update, timeout_s=300.0)

    def until_another_update(self) -> None:
        """Wait until the run has made an update which, for all that is known, it had not made before."""
        self.until_update(self.last_update() + 1)

    def learner_resumed_after(self) -> int:
        """The update after which the newest heir of the learner went on."""
        return int(re.findall(r"the learner goes on after update (\d+)\n", self.output)[-1])

    def actor(self, role_and_number: str) -> tuple[str, psutil.Process]:
        """The newest actor with a role and a number, such as ``rollout-0``: its name and its process, which lives."""
        named = [
            each
            for each in self.events("actor_started")
            if each["actor"].partition(".")[0] == role_and_number
        ]
        process = psutil.Process(named[-1]["pid"])
        assert is_alive(process) and process.status() != psutil.STATUS_STOPPED, (
            role_and_number,
            process.status(),
        )
        assert "ray::" in process.cmdline()[0], process.cmdline()
        return named[-1]["actor"], process

    def engine_of(self, role_and_number: str) -> tuple[str, psutil.Process]:
        """The engine core of an actor."""
        name, process = self.actor(role_and_number)
        cores = [
            each for each in process.children(recursive=True) if ENGINE_CORE.search(" ".join(each.cmdline()))
        ]
        assert len(cores) == 1, [each.cmdline() for each in process.children(recursive=True)]
        return name, cores[0]

    def until_replaced(self, name: str, timeout_s: float = 180.0) -> dict[str, Any]:
        """Wait until an actor has one more heir that serves; returns the event."""
        self._num_replaced += 1
        events = self.until(lambda: self.events("member_replaced")[self._num_replaced - 1 :], timeout_s)
        assert [event["member"] for event in events] == [name]
        return events[0]


def assert_audit_is_clean(run: Path, num_updates: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "audit", str(run)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{num_updates} updates, ")
    assert done.stdout.endswith("every draw adds up\n")
