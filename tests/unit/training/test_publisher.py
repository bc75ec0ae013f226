"""A push through shared memory: versions rise, old bytes go, a slow engine ends it."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
import torch

from deploy.run.training.publisher import FleetPublisher
from distill.interfaces import WeightManifest, WeightPushError
from distill.weights import loading, stored_versions, verify
from learner.process.publish import WeightFile


class Receiver:
    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.manifests: list[WeightManifest] = []

    async def update_weights(self, manifest: WeightManifest) -> None:
        await asyncio.sleep(self.delay_s)
        verify(manifest)
        self.manifests.append(manifest)


class Broken:
    async def update_weights(self, manifest: WeightManifest) -> None:
        raise WeightPushError("engine", 1, f"load version {manifest.policy_version}; it cannot load it")


class Writer:
    def __init__(self, folder: Path) -> None:
        self._file = WeightFile(lambda: [("a", torch.ones(3))], folder, torch.float32)

    async def write_weights(self, policy_version: int, updates_done: int) -> WeightManifest:
        return self._file.write(policy_version, updates_done)


def publisher(folder: Path, *receivers: Receiver | Broken, deadline_s: float = 5.0) -> FleetPublisher:
    versions = itertools.count(1).__next__
    return FleetPublisher(
        Writer(folder).write_weights, lambda: receivers, versions, folders=[folder], deadline_s=deadline_s
    )


async def publish(pushes: FleetPublisher, update: int) -> int:
    manifest = await pushes.write(update)
    await pushes.send(manifest)
    return manifest.policy_version


async def test_only_the_newest_weights_stay_in_shared_memory(tmp_path: Path) -> None:
    receivers = Receiver(), Receiver()
    pushes = publisher(tmp_path, *receivers)
    assert [await publish(pushes, update) for update in range(4)] == [1, 2, 3, 4]
    assert stored_versions(tmp_path) == [4]
    for receiver in receivers:
        assert [manifest.update for manifest in receiver.manifests] == [0, 1, 2, 3]
    assert pushes.newest == receivers[0].manifests[-1]
    assert pushes.stats()["timing/push_s"] > 0


async def test_a_push_has_a_deadline(tmp_path: Path) -> None:
    with pytest.raises(
        WeightPushError,
        match=r"^push of policy version 1 must be loaded within weights\.deadline_s=0\.05; raise the deadline",
    ):
        await publish(publisher(tmp_path, Receiver(), Receiver(delay_s=5), deadline_s=0.05), 0)


async def test_a_bad_engine_is_no_part_of_a_push(tmp_path: Path) -> None:
    good, hanging = Receiver(), Receiver(delay_s=5)
    failed: list[tuple[object, str]] = []
    pushes = publisher(tmp_path, good, hanging, Broken(), deadline_s=0.05)
    pushes._failed = lambda receiver, error: failed.append((type(receiver), str(error)))
    assert await publish(pushes, 0) == 1
    assert [manifest.policy_version for manifest in good.manifests] == [1]
    assert pushes.newest == good.manifests[0]
    assert [(kind, "loaded within" in text or "cannot load" in text) for kind, text in failed] == [
        (Receiver, True),
        (Broken, True),
    ]
    assert await publish(pushes, 1) == 2  # the next push goes on


async def test_a_push_waits_for_pinned_weights(tmp_path: Path) -> None:
    """A second one can pin them while a push already waits, because the first may wait for the second."""
    receiver = Receiver(delay_s=0.02)
    pushes = publisher(tmp_path, receiver)
    manifest = await pushes.write(0)
    async with pushes.pinned():
        push = asyncio.create_task(pushes.send(manifest))
        await asyncio.sleep(0.01)
        async with asyncio.timeout(1), pushes.pinned():
            await asyncio.sleep(0.01)
        assert not receiver.manifests and not push.done()
    await asyncio.sleep(0.01)
    async with pushes.pinned():  # waits for the push under way
        assert receiver.manifests == [manifest]
    await push


async def test_a_file_that_a_receiver_still_loads_outlives_the_next_pushes(tmp_path: Path) -> None:
    pushes = publisher(tmp_path, Receiver())
    manifest = await pushes.write(0)
    with loading(manifest):
        assert [await publish(pushes, update) for update in (1, 2)] == [2, 3]
        assert stored_versions(tmp_path) == [1, 3]
        verify(manifest)
    await publish(pushes, 3)
    assert stored_versions(tmp_path) == [4]
