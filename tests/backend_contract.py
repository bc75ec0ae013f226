"""What every backend of actors does, as tests: a subclass provides the fixture ``backend``."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy.cluster.backend import Backend
from deploy.cluster.failures import ActorFailed
from distill.errors import ConfigError, Diverged
from distill.machine.remote import Remote
from distill.run.inputs import shared_memory_root


class Worker:
    """An actor with methods that succeed, fail and wait."""

    def __init__(self, word: str = "", closed: str | None = None) -> None:
        if not word:
            raise ConfigError("word", word, "have a letter", "give one")
        self.word = word
        self._closed = closed

    def pid(self) -> int:
        return os.getpid()

    def say(self, times: int) -> str:
        return self.word * times

    async def relay(self, other: Any, times: int) -> str:
        return self.word + await Remote(other).say(times)

    async def wait(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return self.word

    async def diverge(self) -> None:
        raise Diverged("loss", float("nan"), "be finite", "lower the rate")

    async def fail_in_a_group(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(30))
            group.create_task(self._fail())

    async def _fail(self) -> None:
        raise KeyError("x")

    async def close(self) -> None:
        if self._closed is not None:
            Path(self._closed).touch()


class Counting(Worker):
    """An actor that counts its calls."""

    def __init__(self) -> None:
        super().__init__("a")
        self._count = 0

    def count(self) -> int:
        self._count += 1
        return self._count


class BackendContract:
    """Tests of one open backend."""

    def test_results_come_by_actor_and_actors_call_each_other(self, backend: Backend) -> None:
        first = backend.start_actor("first", Worker, "a", num_threads=1)
        second = backend.start_actor("second", Worker, "b", num_threads=1)
        ticks: list[float] = []
        calls = {"first": first.say.remote(2), "second": second.relay.remote(first, 3)}
        assert backend.wait(calls, tick=lambda: ticks.append(0.0)) == {"first": "aa", "second": "baaa"}
        assert ticks

    def test_ticks_go_on_while_a_call_runs(self, backend: Backend) -> None:
        actor = backend.start_actor("actor", Worker, "a", num_threads=1)
        ticks: list[float] = []
        calls = {"actor": actor.wait.remote(1.0)}
        backend.wait(calls, tick=lambda: ticks.append(time.monotonic()), interval_s=0.1)
        assert len(ticks) >= 5

    def test_error_keeps_its_class_and_gains_the_name_of_the_actor(self, backend: Backend) -> None:
        actor = backend.start_actor("actor", Worker, "a", num_threads=1)
        slow = backend.start_actor("slow", Worker, "b", num_threads=1)
        start = time.monotonic()
        with pytest.raises(Diverged, match=r"^actor: loss=nan must be finite; lower the rate$"):
            backend.wait({"slow": slow.wait.remote(30.0), "actor": actor.diverge.remote()})
        assert time.monotonic() - start < 15, "the first failure ends the wait"

    def test_first_error_of_a_group_is_reported(self, backend: Backend) -> None:
        actor = backend.start_actor("actor", Worker, "a", num_threads=1)
        with pytest.raises(ActorFailed, match=r"^actor must finish its work; it raised KeyError: 'x'$"):
            backend.wait({"actor": actor.fail_in_a_group.remote()})

    def test_failed_constructor_names_actor_and_cause(self, backend: Backend) -> None:
        with pytest.raises((ActorFailed, ConfigError), match=r"^broken.*word= must have a letter; give one$"):
            backend.start_actor("broken", Worker, "", num_threads=1)

    def test_late_call_is_named(self, backend: Backend) -> None:
        actor = backend.start_actor("actor", Worker, "a", num_threads=1)
        calls = {"actor": actor.wait.remote(0.0), "late": actor.wait.remote(30.0)}
        with pytest.raises(ActorFailed, match=r"^late must answer within 1 s; raise cluster.start_timeout_s"):
            backend.wait(calls, interval_s=0.1, timeout_s=1.0)

    def test_poll_returns_a_result_or_none(self, backend: Backend) -> None:
        actor = backend.start_actor("actor", Worker, "a", num_threads=1)
        assert backend.poll(actor.say.remote(2), timeout_s=20.0) == "aa"
        assert backend.poll(actor.diverge.remote(), timeout_s=20.0) is None
        assert backend.poll(actor.wait.remote(30.0), timeout_s=0.1) is None

    def test_ended_actor_is_closed(self, backend: Backend, tmp_path: Path) -> None:
        backend.start_actor("actor", Worker, "a", str(tmp_path / "closed"), num_threads=1)
        backend.end_actor("actor")
        assert (tmp_path / "closed").exists()
        backend.start_actor("actor", Worker, "a", num_threads=1)  # the name is free again

    def test_a_killed_actor_is_not_asked(self, backend: Backend) -> None:
        actor = backend.start_actor("actor", Worker, "a", num_threads=1)
        pid = backend.actor_pid("actor")
        process = psutil.Process(pid) if pid is not None else None
        if process is not None:
            process.suspend()  # it could not answer
        backend.kill_actor("actor")
        assert process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        if process is not None:
            with pytest.raises(ActorFailed, match=r"^actor must live; it died"):
                backend.wait({"actor": actor.say.remote(1)})
        backend.kill_actor("actor")  # it need not be there
        backend.start_actor("actor", Worker, "a", num_threads=1)  # the name is free again

    def test_an_actor_that_revives_keeps_its_handle(self, backend: Backend) -> None:
        actor = backend.start_actor("actor", Counting, num_threads=1, revives=True)
        assert backend.wait({"actor": actor.count.remote()}) == {"actor": 1}
        pid = backend.actor_pid("actor")
        if pid is not None:
            psutil.Process(pid).suspend()  # it could not answer
        backend.revive_actor("actor")
        assert backend.wait({"actor": actor.count.remote()}) == {"actor": 1}
        assert pid is None or backend.actor_pid("actor") != pid
        if pid is not None:
            psutil.Process(
                backend.actor_pid("actor")
            ).kill()  # Ray may have started it again before the next call
            backend.revive_actor("actor")
            assert backend.wait({"actor": actor.count.remote()}) == {"actor": 1}

    def test_process_of_an_actor(self, backend: Backend) -> None:
        actor = backend.start_actor("actor", Worker, "a", num_threads=1)
        pid = backend.actor_pid("actor")
        own = backend.wait({"actor": actor.pid.remote()})["actor"]
        assert own == (os.getpid() if pid is None else pid)


def check_leaving(backend: Backend, run_id: str, tmp_path: Path) -> None:
    """Opens a backend; checks that leaving it by an error closes all actors and removes the shared folder."""
    folder = shared_memory_root() / f"distill-{run_id}"
    with pytest.raises(KeyboardInterrupt), backend:
        for name in ("first", "second"):
            backend.start_actor(name, Worker, "a", str(tmp_path / name), num_threads=1)
        assert folder.is_dir()
        raise KeyboardInterrupt
    assert not folder.exists()
    assert all((tmp_path / name).exists() for name in ("first", "second"))
