"""Which Ray a run uses, and whether that can be reached, without connecting to it.

Ray itself retries for a minute and ends in a traceback when nothing, or something else, listens at an address. The
questions are therefore put by a process of their own, which is killed when it takes too long.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy.placement import Node
from deploy.version import versions
from distill.config import ClusterConfig
from distill.config.runtime import head_address_violations
from distill.errors import ConfigError

SETTING, VARIABLE = "cluster.address", "RAY_ADDRESS"
CONNECT_TIMEOUT_S = 5.0
"""How long a head may take to accept a connection."""
PROBE_TIMEOUT_S = 15.0
"""How long a process may take to import Ray and ask the head."""
NEEDS_TOKEN = "accept this user's token, or need none"
TOKEN_REMEDY = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the head"
NO_TOKEN_REMEDY = (
    "run `ray get-auth-token --generate` on each node, start Ray there with RAY_AUTH_MODE=token, or, in a network that "
    "only trusted machines reach, set cluster.require_token=false"
)
_REMEDY = "check that `ray start --head` runs there, and that the address is the one that it printed"


@dataclass(frozen=True)
class HeadAddress:
    """The address of a Ray head, and where it was written."""

    name: str
    value: str


def head_address(config: ClusterConfig, environment: Mapping[str, str] = os.environ) -> HeadAddress | None:
    """The head of the cluster that a run uses; None for a Ray of its own.

    Raises: ConfigError when RAY_ADDRESS is not the address of a head.
    """
    address = HeadAddress(SETTING, config.address)
    if config.address == "auto":
        address = HeadAddress(VARIABLE, environment.get(VARIABLE, "").strip() or "local")
    if address.value == "local":
        return None
    if address.value == "auto":
        return _running_here(address)
    for violation in head_address_violations(address.name, address.value):
        raise violation
    return address


def probe(address: HeadAddress) -> Node:
    """Ask a head for its versions and for the node of this machine; returns that node, with nothing taken.

    Raises: ConfigError when the head does not answer in time, refuses this user's token, has another version of Ray or
    Python, or has no node on this machine.
    """
    _connect(address)
    try:
        facts = _facts(address.value, os.environ)
    except (subprocess.SubprocessError, ValueError, IndexError):
        must = "be the address of a Ray head (something listens there, but does not answer as one)"
        raise ConfigError(address.name, address.value, must, _REMEDY) from None
    if "refused" in facts:
        raise ConfigError(address.name, address.value, NEEDS_TOKEN, TOKEN_REMEDY)
    require_versions(address, facts)
    here = facts["here"]
    if here is None:
        must = f"have a node on this machine, because a run's driver is on a node (it has {facts['num_nodes']} elsewhere)"
        remedy = "use `distill submit`, or run the command on the head"
        raise ConfigError(address.name, address.value, must, remedy)
    cpus, gpus = here["resources"].get("CPU", 0.0), here["resources"].get("GPU", 0.0)
    return Node(
        address=here["address"],
        num_cpus=cpus,
        num_gpus=gpus,
        free_cpus=cpus,
        free_gpus=gpus,
        num_others=facts["num_nodes"] - 1,
    )


def require_token_authentication(address: HeadAddress, node: Node) -> None:
    """Require that a head which other machines can reach refuses users without its token.

    Ray runs the code that a client sends, so without a token each machine that reaches the head can run commands. The
    question is put as by a user without a token, because a head without authentication accepts every token as well.

    Raises: ConfigError when the head answers.
    """
    host = address.value.rpartition(":")[0].strip("[]")
    if _is_loopback(host) and _is_loopback(node.address):
        return
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    try:
        facts = _facts(address.value, without | {"RAY_AUTH_MODE": "disabled"})
    except (subprocess.SubprocessError, ValueError, IndexError):
        return  # it did not answer such a user
    if "refused" not in facts:
        must = "need a token, because other machines can reach it, and Ray runs what they send"
        raise ConfigError(address.name, address.value, must, NO_TOKEN_REMEDY)


def _facts(address: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ask a head from a process with an environment; returns its answer. Raises: SubprocessError, ValueError, IndexError."""
    command = [sys.executable, "-m", "deploy.cluster.probe", address]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PROBE_TIMEOUT_S,
        check=True,
        stdin=subprocess.DEVNULL,
        env=dict(environment),
    )
    return json.loads(done.stdout.splitlines()[-1])


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine alone: every address that it has is a loopback address."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(each.partition("%")[0]).is_loopback for each in found)


def require_versions(address: HeadAddress, facts: Mapping[str, Any]) -> None:
    """Compare the versions of a head, ``Ray`` and ``Python`` in ``facts``, with those of this process.

    Raises: ConfigError with both versions.
    """
    mine = versions()
    for name in ("Ray", "Python"):
        if facts[name] != mine[name]:
            must = f"run {name} {mine[name]} as this process does (the cluster runs {facts[name]})"
            remedy = "use one version on both sides"
            raise ConfigError(address.name, address.value, must, remedy)


def _connect(address: HeadAddress) -> None:
    """Open a connection and close it. Raises: ConfigError."""
    host, _, port = address.value.rpartition(":")
    if reason := refusal_of(host.strip("[]"), int(port)):
        must = (
            f"be the address of a Ray head that accepts connections within {CONNECT_TIMEOUT_S:g} s ({reason})"
        )
        raise ConfigError(address.name, address.value, must, _REMEDY)


def refusal_of(host: str, port: int) -> str | None:
    """Open a connection and close it; returns why it was not accepted in time, or None."""
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
    return None


def _running_here(address: HeadAddress) -> HeadAddress:
    """The head that runs on this machine, for RAY_ADDRESS=auto. Raises: ConfigError unless there is exactly one."""
    from ray._private.services import find_gcs_addresses

    found = sorted(find_gcs_addresses())
    if len(found) != 1:
        must = f"name one running Ray, but there are {len(found)} on this machine"
        remedy = "give the HOST:PORT that `ray start --head` printed, or unset it for a local Ray"
        raise ConfigError(address.name, address.value, must, remedy)
    return HeadAddress(address.name, found[0])
