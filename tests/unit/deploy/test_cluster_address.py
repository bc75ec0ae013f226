"""Which Ray a run uses, and how wrong addresses are refused."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from deploy.cluster import address as module
from deploy.cluster.address import HeadAddress, head_address, probe, require_versions
from deploy.version import versions
from distill.config import ClusterConfig
from distill.errors import ConfigError


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of a port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [
        ("local", "10.0.0.1:6379", None),
        ("auto", None, None),
        ("auto", "", None),
        ("auto", "local", None),
        ("auto", "10.0.0.1:6379", HeadAddress("RAY_ADDRESS", "10.0.0.1:6379")),
        ("10.0.0.2:6379", "10.0.0.1:6379", HeadAddress("cluster.address", "10.0.0.2:6379")),
        ("[::1]:6379", None, HeadAddress("cluster.address", "[::1]:6379")),
    ],
)
def test_which_ray_a_run_uses(setting: str, variable: str | None, expected: HeadAddress | None):
    environment = {} if variable is None else {"RAY_ADDRESS": variable}
    assert head_address(ClusterConfig(address=setting), environment) == expected


@pytest.mark.parametrize(
    "wrong", ["ray://h:10001", "http://h:8265", "h", ":6379", "h:0", "h:port", "h:99999"]
)
def test_what_is_no_address_of_a_head_is_refused_with_its_origin(wrong: str):
    for config, environment, name in (
        (ClusterConfig(address=wrong), {}, "cluster.address"),
        (ClusterConfig(), {"RAY_ADDRESS": wrong}, "RAY_ADDRESS"),
    ):
        with pytest.raises(ConfigError) as error:
            head_address(config, environment)
        assert str(error.value).startswith(
            f"{name}={wrong} must be auto, local or the HOST:PORT of a Ray head"
        )
        assert error.value.remedy
    assert [violation.value for violation in ClusterConfig(address=wrong).violations()] == [wrong]


def test_a_closed_port_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"accepts connections within 5 s \(Connection refused\); check that"
    ):
        probe(HeadAddress("cluster.address", f"127.0.0.1:{closed}"))
    assert time.monotonic() - began < 2


def test_a_silent_port_is_refused_in_bounded_time(listener: str, monkeypatch: pytest.MonkeyPatch):
    """The process that asks is killed; its code is exchanged for one that waits, because Ray is slow to import."""
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 0.5)
    waits = [sys.executable, "-c", "import time; time.sleep(60)"]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run(waits, **options))
    with pytest.raises(ConfigError, match="something listens there, but does not answer as one"):
        probe(HeadAddress("cluster.address", listener))


def test_another_version_is_refused_with_both():
    mine = versions()
    require_versions(HeadAddress("cluster.address", "h:1"), mine)
    for name in ("Ray", "Python"):
        with pytest.raises(ConfigError) as error:
            require_versions(HeadAddress("cluster.address", "h:1"), mine | {name: "2.9.9"})
        assert f"run {name} {mine[name]} as this process does (the cluster runs 2.9.9)" in str(error.value)
