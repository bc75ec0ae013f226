"""The backend of objects in one process fulfils the contract."""

from __future__ import annotations

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


def test_leaving(tmp_path: Path) -> None:
    run_id = secrets.token_hex(4)
    check_leaving(InProcess(run_id), run_id, tmp_path)
