"""A write that does not fit is repeated for a while; the user hears of it once."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from deploy.cluster.failures import ActorFailed
from deploy.run.training import room as module
from deploy.run.training.fleet import Fleet, Member
from deploy.run.training.publisher import FleetPublisher
from deploy.run.training.room import Room
from distill.interfaces import Holder, WeightManifest
from distill.room import NoSpace
from distill.run.inputs import RunInputs

FULL = NoSpace.of(errno.ENOSPC, Path("/tmp/x"), 1 << 20)


class Told:
    """A room with what it told, and a write that fails some times."""

    def __init__(self, wait_s: float, failures: int = 0) -> None:
        self.lines: list[str] = []
        self.events: list[str] = []
        self.room = Room(wait_s, self.lines.append, lambda name, **fields: self.events.append(name))
        self.failures = failures

    async def write(self, result: str = "written") -> str:
        return self.write_at_once(result)

    def write_at_once(self, result: str = "written") -> str:
        if self.failures:
            self.failures -= 1
            raise FULL
        return result


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.001)


async def test_a_write_that_fits_says_nothing() -> None:
    told = Told(60)
    assert await told.room.of(told.write) == await told.room.of(told.write_at_once) == "written"
    assert (told.lines, told.events) == ([], [])


@pytest.mark.parametrize("kind", ["write", "write_at_once"])
async def test_a_write_is_repeated_until_there_is_room(kind: str) -> None:
    told = Told(60, failures=3)
    assert await told.room.of(getattr(told, kind)) == "written"
    assert told.events == ["waiting_for_room", "room_found"]
    warning, found = told.lines
    assert warning.startswith("warning: free space for /tmp/x=") and warning.endswith("for at most 60 s")
    assert found == "there is room again after 0 s"


async def test_the_wait_has_an_end() -> None:
    told = Told(0.01, failures=1 << 30)
    with pytest.raises(NoSpace):
        await told.room.of(told.write)
    assert told.events == ["waiting_for_room"]


async def test_without_a_wait_the_first_error_ends_it() -> None:
    told = Told(0, failures=1)
    with pytest.raises(NoSpace):
        await told.room.of(told.write)
    assert (told.lines, told.events, told.failures) == ([], [], 0)


async def test_other_errors_are_not_repeated() -> None:
    def fail() -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        await Told(60).room.of(fail)


async def test_a_push_that_waits_for_room_keeps_its_version(tmp_path: Path) -> None:
    told, versions = Told(60, failures=2), iter((4, 5))
    written: list[int] = []

    async def write(version: int, updates_done: int) -> WeightManifest:
        written.append(version)
        await told.write()
        return WeightManifest(
            policy_version=version, update=updates_done, path="/x", num_bytes=1, checksum="0"
        )

    publisher = FleetPublisher(
        write, list, lambda: next(versions), folders=[tmp_path], deadline_s=1, room=told.room
    )
    assert (await publisher.write(0)).policy_version == 4
    assert written == [4, 4, 4]


def test_what_shared_memory_has_no_room_for_is_said_once() -> None:
    told = Told(60)
    values: Any = dict.fromkeys(RunInputs.__dataclass_fields__, "") | {"run_id": "1"}
    inputs = RunInputs(**values)
    told.room.note_rows({"rollout/num_diverted": 0.0, "teacher/num_diverted": 0.0}, inputs)
    told.room.note_weights(manifest(f"{inputs.weights}/weights-v1"), inputs)
    assert told.events == []
    for _ in range(2):
        told.room.note_rows({"rollout/num_diverted": 0.0, "teacher/num_diverted": 2.0}, inputs)
        told.room.note_weights(manifest("/runs/my/replay/weights-v1"), inputs)
    assert told.events == ["shared_memory_full"] * 2
    assert [line.split(" has no room for all ")[1].split(",")[0] for line in told.lines] == [
        "rows",
        "weights",
    ]


def manifest(path: str) -> WeightManifest:
    return WeightManifest(policy_version=1, update=0, path=path, num_bytes=1, checksum="0")


def test_an_actor_without_room_ends_the_run_instead_of_being_replaced() -> None:
    """Its heir would have no more room, and the actor has waited already."""
    nobody: Any = None
    member = Member(Holder("rollout", 0), nobody)
    fleet = Fleet(replay=nobody, learner=nobody, rollouts=[member], scorers=[], teachers=[])
    with pytest.raises(NoSpace, match=r"^rollout-0: free space for /tmp/x"):
        fleet.failed(member, ActorFailed.raised("rollout-0", FULL))
    assert fleet.failures.empty()
