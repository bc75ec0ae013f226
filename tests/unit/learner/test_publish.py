"""A push through shared memory: versions rise, old bytes go, a slow engine ends it."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
import torch

from distill.interfaces import WeightManifest, WeightPushError
from distill.weights import stored_versions, verify
from learner.process.publish import SharedMemoryPublisher


class Receiver:
    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.manifests: list[WeightManifest] = []

    async def update_weights(self, manifest: WeightManifest) -> None:
        await asyncio.sleep(self.delay_s)
        verify(manifest)
        self.manifests.append(manifest)


def publisher(folder: Path, receiver: Receiver, deadline_s: float = 5.0) -> SharedMemoryPublisher:
    return SharedMemoryPublisher(
        weights=lambda: [("a", torch.ones(3))],
        receivers=[receiver],
        next_version=itertools.count(1).__next__,
        folder=folder,
        deadline_s=deadline_s,
    )


async def test_only_the_newest_weights_stay_in_shared_memory(tmp_path: Path) -> None:
    receiver = Receiver()
    pushes = publisher(tmp_path, receiver)
    assert [await pushes.publish(update) for update in range(4)] == [1, 2, 3, 4]
    assert stored_versions(tmp_path) == [4]
    assert [manifest.update for manifest in receiver.manifests] == [0, 1, 2, 3]


async def test_a_push_has_a_deadline(tmp_path: Path) -> None:
    with pytest.raises(
        WeightPushError,
        match=r"^push of policy version 1 must reach all 1 engines within weights\.deadline_s=0\.05; raise the deadline",
    ):
        await publisher(tmp_path, Receiver(delay_s=5), deadline_s=0.05).publish(0)
