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


class Writer:
    def __init__(self, folder: Path) -> None:
        self._file = WeightFile(lambda: [("a", torch.ones(3))], folder, torch.float32)

    async def write_weights(self, policy_version: int, updates_done: int) -> WeightManifest:
        return self._file.write(policy_version, updates_done)


def publisher(folder: Path, *receivers: Receiver, deadline_s: float = 5.0) -> FleetPublisher:
    versions = itertools.count(1).__next__
    return FleetPublisher(Writer(folder), lambda: receivers, versions, folder=folder, deadline_s=deadline_s)


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
        match=r"^push of policy version 1 must reach all 2 engines within weights\.deadline_s=0\.05; raise the deadline",
    ):
        await publish(publisher(tmp_path, Receiver(), Receiver(delay_s=5), deadline_s=0.05), 0)


async def test_a_file_that_a_receiver_still_loads_outlives_the_next_pushes(tmp_path: Path) -> None:
    pushes = publisher(tmp_path, Receiver())
    manifest = await pushes.write(0)
    with loading(manifest):
        assert [await publish(pushes, update) for update in (1, 2)] == [2, 3]
        assert stored_versions(tmp_path) == [1, 3]
        verify(manifest)
    await publish(pushes, 3)
    assert stored_versions(tmp_path) == [4]
