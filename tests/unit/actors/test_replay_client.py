"""What an actor hears of a replay whose process is gone: that it is to call again."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from actors.replay_client import ReplayClient
from distill.interfaces import ReplayUnavailable


class RayActorError(Exception):
    """Stands for Ray's, which the unit tests do without."""


class Wrapped(Exception):
    """An error as Ray wraps it."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


def client(error: Exception | None) -> Any:
    async def call(*args: object) -> object:
        if error is not None:
            raise error
        return args

    return ReplayClient(SimpleNamespace(exchange=SimpleNamespace(remote=call)))


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("ray.exceptions")
    for name in ("OutOfMemoryError", "NodeDiedError", "WorkerCrashedError"):
        setattr(module, name, type(name, (Exception,), {}))
    module.RayActorError = RayActorError
    monkeypatch.setitem(sys.modules, "ray.exceptions", module)


async def test_an_answer_is_passed_on() -> None:
    assert await client(None).exchange(1, 2) == (1, 2)


@pytest.mark.parametrize(
    "error", [RayActorError("it is restarting"), Wrapped(ReplayUnavailable("replay", 1, "know")), ReplayUnavailable("replay", 1, "know")]
)  # fmt: skip
async def test_a_replay_that_is_away_is_called_again(error: Exception) -> None:
    with pytest.raises(ReplayUnavailable):
        await client(error).exchange()


async def test_another_error_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        await client(KeyError("x")).exchange()
    monkeypatch.delitem(sys.modules, "ray.exceptions")
    with pytest.raises(RayActorError):
        await client(RayActorError("no Ray here")).exchange()
