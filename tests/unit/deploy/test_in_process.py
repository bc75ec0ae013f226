"""The backend of objects in one process fulfils the contract."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.cluster.backend import Backend
from deploy.cluster.in_process import InProcess
from tests.backend_contract import BackendContract, check_leaving


class TestInProcess(BackendContract):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        with InProcess(secrets.token_hex(4)) as backend:
            yield backend


class Holder:
    """An actor whose call needs the event loop once more when it is cancelled."""

    def __init__(self, released: str) -> None:
        self._released = Path(released)

    async def hold(self) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.05)
            self._released.touch()


def test_leaving_waits_for_the_cleanup_of_calls(tmp_path: Path) -> None:
    with InProcess(secrets.token_hex(4)) as backend:
        holder = backend.start_actor("holder", Holder, str(tmp_path / "released"), num_threads=1)
        assert backend.poll(holder.hold.remote(), timeout_s=0.1) is None
    assert (tmp_path / "released").exists()


def test_leaving(tmp_path: Path) -> None:
    run_id = secrets.token_hex(4)
    check_leaving(InProcess(run_id), run_id, tmp_path)
