"""A run's folder in shared memory: which driver owns it, and what a claim waits for."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from deploy.cluster import scope
from deploy.cluster.scope import ClaimFailed, SharedFolder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scope, "shared_memory_root", lambda: tmp_path)
    return tmp_path


def test_claim_keeps_folders_of_living_drivers_and_removes_others(root: Path):
    (root / "distill-dead").mkdir()
    first, second = SharedFolder("first"), SharedFolder("second")
    first.claim()
    second.claim()
    assert {path.name for path in root.glob("distill-*")} == {"distill-first", "distill-second"}
    first.release()
    second.release()
    assert not list(root.glob("distill-*"))


def test_claim_that_cannot_begin_names_the_lock(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scope, "CLAIM_TIMEOUT_S", 0.1)
    with open(root / f".distill-claim-{os.getuid()}", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ClaimFailed, match=r"\.distill-claim-.* must be free within 0.1 s"):
            SharedFolder("late").claim()
    free = SharedFolder("late")
    free.claim()
    free.release()
