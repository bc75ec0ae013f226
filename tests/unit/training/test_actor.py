"""How the driver calls an actor: its name in every failure, and deadlines."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.cluster.actor import Actor
from deploy.cluster.failures import ActorFailed, ActorGone
from deploy.cluster.in_process import Handle
from distill.errors import ConfigError


class Worker:
    async def hang(self) -> None:
        await asyncio.sleep(60)

    def refuse(self) -> None:
        raise ConfigError("setting", 1, "be 2", "set it to 2")

    def break_down(self) -> None:
        raise ZeroDivisionError("division by zero")


@pytest.fixture
async def actor() -> Actor:
    handle: Any = Handle(Worker(), asyncio.get_running_loop())
    backend: Any = SimpleNamespace(failure=ActorFailed.raised)
    return Actor("rollout-0.1000", handle, backend)


async def test_a_failure_has_the_actors_name(actor: Actor) -> None:
    with pytest.raises(ConfigError, match=r"^rollout-0\.1000: setting=1 must be 2; set it to 2$"):
        await actor.refuse()
    with pytest.raises(
        ActorFailed, match=r"^rollout-0\.1000 must finish its work; it raised ZeroDivisionError"
    ):
        await actor.break_down()


async def test_an_actor_that_does_not_answer_is_named(actor: Actor) -> None:
    with pytest.raises(ActorFailed, match=r"^rollout-0\.1000 must answer within 0\.02 s"):
        await actor.within(0.02, "hang")


async def test_every_call_of_an_actor_that_waits_for_no_other_has_a_deadline(actor: Actor) -> None:
    backend: Any = SimpleNamespace(failure=ActorFailed.raised)
    hasty = Actor(actor.name, actor.handle, backend, stall_timeout_s=0.02)
    with pytest.raises(
        ActorFailed, match=r"must finish some of its work within cluster\.stall_timeout_s=0\.02 "
    ):
        await hasty.hang()
    with pytest.raises(ConfigError, match=r"^rollout-0\.1000: setting=1 must be 2"):
        await hasty.refuse()


def test_an_actor_that_died_while_memory_was_short_names_memory() -> None:
    plain = ActorGone.died("rollout-0", "exit code 137")
    assert str(plain) == "rollout-0 must live; it died (exit code 137)"
    short = ActorGone.died("rollout-0", "exit code 137", num_killed=2)
    assert str(short).startswith(
        "rollout-0 must live; it died (exit code 137), and 2 processes of the container or machine ran out of memory; "
        "give the run more memory, or lower kv_cache_gib"
    )
