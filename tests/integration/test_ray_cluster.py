"""The backend of Ray actors fulfils the contract that the one in a single process does."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from deploy.cluster import address as address_module
from deploy.cluster.address import HeadAddress, require_token_authentication
from deploy.cluster.backend import Backend
from deploy.cluster.ray_cluster import RayCluster
from deploy.placement import Node
from distill.config import ClusterConfig
from distill.errors import ConfigError
from tests.backend_contract import BackendContract, Worker, check_leaving
from tests.integration.ray_head import RayHead

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("no_tokens")]


class TestRayCluster(BackendContract):
    @pytest.fixture(scope="class")
    def cluster(self) -> Iterator[RayCluster]:
        """One Ray for all tests, because its start takes seconds."""
        with RayCluster(ClusterConfig(address="local"), secrets.token_hex(4)) as cluster:
            assert cluster.service_pids()
            yield cluster

    @pytest.fixture
    def backend(self, cluster: RayCluster) -> Iterator[Backend]:
        yield cluster
        for name in list(cluster._handles):
            cluster.end_actor(name)


class Placed(Worker):
    """An actor that knows where it is."""

    def place(self) -> tuple[str, str, str]:
        return (
            ray.get_runtime_context().get_node_id(),
            os.environ.get("CUDA_VISIBLE_DEVICES", "all"),
            os.environ["OMP_NUM_THREADS"],
        )


class TestOnAHead(BackendContract):
    """The same on a cluster of two nodes, of which the actors use the driver's."""

    @pytest.fixture(scope="class")
    def head(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
        head = RayHead(tmp_path_factory.mktemp("cache"), token=False)
        head.join(num_cpus=8)
        yield head
        head.stop()

    @pytest.fixture(scope="class")
    def cluster(self, head: RayHead) -> Iterator[RayCluster]:
        with RayCluster(ClusterConfig(address=head.address), secrets.token_hex(4)) as cluster:
            assert cluster.service_pids() == []
            yield cluster

    @pytest.fixture
    def backend(self, cluster: RayCluster) -> Iterator[Backend]:
        yield cluster
        for name in list(cluster._handles):
            cluster.end_actor(name)

    def test_actors_stay_on_the_drivers_node_and_see_their_own_devices(self, backend: Backend, head: RayHead):
        node = backend.node()
        assert node is not None
        assert (node.address, node.num_cpus, node.num_gpus, node.num_others) == (head.host, 2, 2, 1)
        shares = {"a": (1.5, 1), "b": (0.5, 1), "c": (0.0, 0)}
        calls = {
            name: backend.start_actor(
                name, Placed, name, num_threads=3, num_cpus=cpus, num_gpus=gpus
            ).place.remote()
            for name, (cpus, gpus) in shares.items()
        }
        places = backend.wait(calls)
        assert {node_id for node_id, _, _ in places.values()} == {ray.get_runtime_context().get_node_id()}
        assert sorted(devices for _, devices, _ in places.values()) == ["", "0", "1"]
        assert places["c"][1] == ""
        assert {threads for _, _, threads in places.values()} == {"3"}
        deadline = time.monotonic() + 10  # Ray reports what is taken with a delay
        while (busy := backend.node()) is not None and busy.free_cpus + busy.free_gpus > 0:
            assert time.monotonic() < deadline, busy
            time.sleep(0.1)


def test_leaving(tmp_path: Path) -> None:
    """The processes that Ray starts end with it. Earlier tests of the session can have left others, such
    as multiprocessing's resource tracker."""
    before = set(psutil.Process().children(recursive=True))
    run_id = secrets.token_hex(4)
    check_leaving(RayCluster(ClusterConfig(address="local"), run_id), run_id, tmp_path)
    started = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(list(started), timeout=10)
    assert not alive


@pytest.mark.parametrize("token", [True, False])
def test_which_heads_other_machines_may_reach(
    token: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refuses a user without its token. The head is on loopback, and is taken for one that is not."""
    head = RayHead(tmp_path, token=token)
    try:
        for name, value in head.access.items():
            monkeypatch.setenv(name, value)
        address = HeadAddress("cluster.address", head.address)
        node = Node(address=head.host, num_cpus=2, num_gpus=0, free_cpus=2, free_gpus=0, num_others=0)
        require_token_authentication(address, node)  # loopback
        monkeypatch.setattr(address_module, "_is_loopback", lambda _: False)
        if token:
            require_token_authentication(address, node)
        else:
            with pytest.raises(ConfigError, match="must need a token, because other machines can reach it"):
                require_token_authentication(address, node)
    finally:
        head.stop()
