"""A run of `distill train` whose processes a test kills and stops.

A victim is chosen by its name in the run's own events and by its state, because a looser choice would silently change
what is tested.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from actors.vllm_engine.processes import is_alive
from distill.run.metrics import read_events, read_metrics
from tests.integration.test_train import start, train_arguments

ENGINE_CORE = re.compile("EngineCore")


class Victims:
    """The processes of one run, which ends with the context."""

    def __init__(self, world: Path, name: str, *settings: str) -> None:
        self.run = world / name
        self._num_replaced = 0
        self.driver = start(world, *train_arguments(world, name, *settings))

    def __enter__(self) -> Victims:
        return self

    def __exit__(self, *_: object) -> None:
        if self.driver.poll() is None:
            self.driver.send_signal(signal.SIGINT)
            try:
                self.driver.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                self.driver.kill()
                self.driver.communicate()

    def finish(self, timeout_s: float = 300) -> str:
        """Wait for the end of the run; returns what it printed."""
        output, _ = self.driver.communicate(timeout=timeout_s)
        assert self.driver.returncode == 0, output[-4000:]
        return output

    def kill_driver(self) -> str:
        """Kill the driver, and check that its actors, engines and Ray end by themselves; returns what it printed.

        Two helpers of Ray outlive it, so the test ends them (docs/reliability.md).
        """
        family = psutil.Process(self.driver.pid).children(recursive=True)
        helpers = [
            each for each in family if each.cmdline()[0] in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
        ]
        family = [each for each in family if each not in helpers]
        assert len(family) > 5
        self.driver.kill()
        output, _ = self.driver.communicate(timeout=30)
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive, [process.cmdline()[:3] for process in alive]
        for helper in helpers:
            with suppress(psutil.NoSuchProcess):
                helper.kill()
        return output

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.run) if event["event"] == name]

    def until(self, condition: Callable[[], Any], timeout_s: float = 120.0) -> Any:
        """Wait until a condition holds while the run goes on; returns its value."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            if self.driver.poll() is not None:
                raise AssertionError(self.driver.communicate()[0][-4000:])
            assert time.monotonic() < end
            time.sleep(0.05)
        return found

    def until_update(self, update: int) -> None:
        """Wait until the file of metrics has this update."""

        def has_come() -> bool:
            done = read_metrics(self.run)["update"].to_pylist() if (self.run / "run.json").exists() else []
            return update == 0 or (bool(done) and done[-1] >= update)

        self.until(has_come, timeout_s=300.0)

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

    def until_replaced(self, name: str, timeout_s: float = 180.0) -> str:
        """Wait until an actor has one more heir that serves; returns its name."""
        self._num_replaced += 1
        events = self.until(lambda: self.events("member_replaced")[self._num_replaced - 1 :], timeout_s)
        assert [event["member"] for event in events] == [name]
        return name
