"""The backend of Ray actors fulfils the contract that the one in a single process does."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.cluster.backend import Backend
from deploy.cluster.ray_cluster import RayCluster
from distill.config import ClusterConfig
from tests.backend_contract import BackendContract, check_leaving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class TestRayCluster(BackendContract):
    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[RayCluster]:
        """One Ray for all tests, because its start takes seconds."""
        with RayCluster(ClusterConfig(), secrets.token_hex(4)) as cluster:
            assert cluster.service_pids()
            yield cluster

    @pytest.fixture
    def backend(self, cluster: RayCluster) -> Iterator[Backend]:
        yield cluster
        for name in list(cluster._handles):
            cluster.end_actor(name)


def test_leaving(tmp_path: Path) -> None:
    """The processes that Ray starts end with it. Earlier tests of the session can have left others, such
    as multiprocessing's resource tracker."""
    before = set(psutil.Process().children(recursive=True))
    run_id = secrets.token_hex(4)
    check_leaving(RayCluster(ClusterConfig(), run_id), run_id, tmp_path)
    started = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(list(started), timeout=10)
    assert not alive
