"""A Ray that other machines can reach needs a token, or the doctor fails."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from actors.vllm_engine.startup import set_environment
from deploy.cluster import address as module
from deploy.cluster.address import HeadAddress, require_token_authentication
from deploy.dashboards import serve
from deploy.placement import Node
from deploy.report import watch
from deploy.run.preflight import machine
from distill.config import ClusterConfig, RunConfig
from distill.errors import ConfigError

OPEN, CLOSED = {"Ray": "2", "here": None}, {"refused": "no token"}


def node(address: str) -> Node:
    return Node(address=address, num_cpus=2, num_gpus=0, free_cpus=2, free_gpus=0, num_others=0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """The environments of the questions to a head, which answers everybody."""
    found: list[Mapping[str, str]] = []

    def facts(_: str, environment: Mapping[str, str]) -> dict[str, Any]:
        found.append(environment)
        return OPEN

    monkeypatch.setattr(module, "_facts", facts)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    return found


@pytest.mark.parametrize(
    ("head", "here"), [("10.0.0.1", "10.0.0.1"), ("127.0.0.1", "10.0.0.1"), ("[2001:db8::1]", "127.0.0.1")]
)
def test_an_open_head_that_others_can_reach_is_refused(asked: list[Mapping[str, str]], head: str, here: str):
    with pytest.raises(ConfigError) as error:
        require_token_authentication(HeadAddress("cluster.address", f"{head}:6379"), node(here))
    assert str(error.value).startswith(
        f"cluster.address={head}:6379 must need a token, because other machines"
    )
    assert "RAY_AUTH_MODE=token" in error.value.remedy and "cluster.require_token=false" in error.value.remedy
    (environment,) = asked
    assert environment["RAY_AUTH_MODE"] == "disabled" and "RAY_AUTH_TOKEN" not in environment


@pytest.mark.parametrize(
    ("head", "here"), [("127.3.2.1", "127.3.2.1"), ("localhost", "127.0.0.1"), ("[::1]", "::1")]
)
def test_a_head_on_loopback_is_not_asked(asked: list[Mapping[str, str]], head: str, here: str):
    require_token_authentication(HeadAddress("cluster.address", f"{head}:6379"), node(here))
    assert asked == []


@pytest.mark.parametrize("answer", [CLOSED, subprocess.TimeoutExpired("ask", 1), ValueError("no JSON")])
def test_a_head_that_refuses_a_user_without_a_token_is_accepted(monkeypatch: pytest.MonkeyPatch, answer: Any):
    def facts(*_: object) -> dict[str, Any]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module, "_facts", facts)
    require_token_authentication(HeadAddress("cluster.address", "10.0.0.1:6379"), node("10.0.0.1"))


@pytest.mark.parametrize("required", [True, False])
def test_the_doctor_asks_unless_it_is_told_not_to(
    asked: list[Mapping[str, str]], monkeypatch: pytest.MonkeyPatch, required: bool
):
    monkeypatch.setattr(machine, "probe", lambda _: node("10.0.0.1"))
    monkeypatch.setattr(machine, "place_on_node", lambda *_, **__: {})
    config = RunConfig(cluster=ClusterConfig(address="10.0.0.1:6379", require_token=required))
    if required:
        with pytest.raises(ConfigError, match="must need a token"):
            list(machine.cluster(config))
    else:
        assert [check.status for check in machine.cluster(config)] == ["pass"]


@pytest.mark.parametrize(
    ("mode", "statuses"), [(None, ["pass"]), ("token", ["pass"]), ("disabled", ["pass", "warn"])]
)
def test_the_doctor_warns_of_a_ray_of_its_own_without_tokens(
    monkeypatch: pytest.MonkeyPatch, mode: str | None, statuses: list[str]
):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert [
        check.status for check in machine.cluster(RunConfig(cluster=ClusterConfig(address="local")))
    ] == statuses


def test_servers_are_on_loopback(monkeypatch: pytest.MonkeyPatch):
    assert watch.HOST == serve.HOST == "127.0.0.1"
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)
    with monkeypatch.context() as patch:
        import os

        patch.setattr(os, "environ", dict(os.environ))
        set_environment(1, 1)
        assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"
