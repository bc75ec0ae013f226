"""The in-process backend keeps the contract of :class:`deploy.cluster.backend.Backend`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.cluster import scope
from deploy.cluster.backend import Backend
from deploy.cluster.failures import ActorFailed
from deploy.cluster.in_process import InProcess
from distill.errors import NO_VALUE, ConfigError, Diverged
from distill.machine.remote import Remote


class Counter:
    """An actor with plain and asynchronous methods."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.closed = False
        self.cancelled = False

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    async def add_later(self, number: int) -> int:
        await asyncio.sleep(0.01)
        return self.add(number)

    async def add_to(self, other: Any, number: int) -> int:
        return await Remote(other).add_later(number)

    async def block(self) -> None:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def fail(self, *errors: Exception) -> None:
        if len(errors) == 1:
            raise errors[0]
        raise ExceptionGroup("several", errors)

    async def close(self) -> None:
        self.closed = True


class Refuses:
    def __init__(self) -> None:
        raise ConfigError("proxy.model", "x", "fit")


@pytest.fixture(autouse=True)
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scope, "shared_memory_root", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def backend(shared: Path) -> Iterator[Backend]:
    with InProcess("0badc0de") as backend:
        yield backend


def started(backend: Backend, name: str = "counter", *args: object) -> Any:
    return backend.start_actor(name, Counter, *args, num_threads=1)


def test_results_come_by_name(backend: Backend) -> None:
    one, two = started(backend, "one", 1), started(backend, "two", 2)
    ticks: list[None] = []
    work = {"one": one.add.remote(10), "two": two.add_later.remote(10)}
    assert backend.wait(work, tick=lambda: ticks.append(None)) == {"one": 11, "two": 12}
    assert ticks


def test_an_actor_calls_another_by_its_handle(backend: Backend) -> None:
    one, two = started(backend, "one"), started(backend, "two")
    assert backend.wait({"one": one.add_to.remote(two, 3)}) == {"one": 3}
    assert backend.poll(two.add.remote(0)) == 3


def test_an_error_for_the_user_keeps_its_class_and_names_the_actor(backend: Backend) -> None:
    error = Diverged("loss", float("nan"), "be finite", "lower the rate")
    with pytest.raises(Diverged, match=r"^learner: loss=nan must be finite; lower the rate$"):
        backend.wait({"learner": started(backend, "learner").fail.remote(error)})


def test_another_error_is_an_actor_that_failed(backend: Backend) -> None:
    with pytest.raises(ActorFailed, match=r"^learner must finish its work; it raised KeyError: 'x'$") as info:
        backend.wait({"learner": started(backend, "learner").fail.remote(KeyError("x"))})
    assert info.value.value is NO_VALUE
    assert isinstance(info.value.__cause__, KeyError)


def test_the_first_error_of_a_group_is_reported(backend: Backend) -> None:
    work = started(backend).fail.remote(ValueError("first"), KeyError("second"))
    with pytest.raises(ActorFailed, match="ValueError: first"):
        backend.wait({"counter": work})


def test_one_failure_ends_the_wait_for_all(backend: Backend) -> None:
    busy, broken = started(backend, "busy"), started(backend, "broken")
    with pytest.raises(ActorFailed, match=r"^broken must finish"):
        backend.wait({"busy": busy.block.remote(), "broken": broken.fail.remote(OSError("full"))})


def test_late_actors_are_named(backend: Backend) -> None:
    counters = {name: started(backend, name) for name in ("b", "a", "quick")}
    work = {name: counters[name].block.remote() for name in ("b", "a")}
    with pytest.raises(ActorFailed, match=r"^a, b must answer within 0 s; raise cluster\.start_timeout_s"):
        backend.wait(work | {"quick": counters["quick"].add.remote(1)}, interval_s=0.05, timeout_s=0.1)


def test_an_actor_that_cannot_be_made_is_named(backend: Backend) -> None:
    with pytest.raises(ConfigError, match=r"^proxy: proxy\.model=x must fit$"):
        backend.start_actor("proxy", Refuses, num_threads=1)


def test_poll_returns_none_for_a_late_or_failed_call(backend: Backend) -> None:
    counter = started(backend)
    assert backend.poll(counter.add.remote(4)) == 4
    assert backend.poll(counter.block.remote(), timeout_s=0.05) is None
    assert backend.poll(counter.fail.remote(ValueError("x"))) is None


def test_actors_have_no_processes_of_their_own(backend: Backend) -> None:
    started(backend)
    assert backend.service_pids() == []
    assert dict(backend.pids) == {}


def test_an_ended_actor_is_closed_and_the_others_go_on(shared: Path) -> None:
    with InProcess("0badc0de") as backend:
        one, two = started(backend, "one"), started(backend, "two")
        backend.end_actor("one")
        assert one._actor.closed and not two._actor.closed
        assert backend.wait({"two": two.add.remote(1)}) == {"two": 1}


def test_leaving_closes_every_actor_and_leaves_no_shared_memory(shared: Path) -> None:
    with pytest.raises(OSError, match="full"), InProcess("0badc0de") as backend:
        one, two = started(backend, "one"), started(backend, "two")
        assert list(shared.glob("distill-*")) == [shared / "distill-0badc0de"]
        assert backend.poll(one.block.remote(), timeout_s=0.05) is None
        raise OSError("full")
    assert one._actor.cancelled
    assert one._actor.closed and two._actor.closed
    assert list(shared.glob("distill-*")) == []


def test_the_backend_loads_nothing_of_ray() -> None:
    code = (
        "import sys, deploy.cluster.in_process;"
        "print([name for name in ('ray', 'deploy.cluster.ray_cluster') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
