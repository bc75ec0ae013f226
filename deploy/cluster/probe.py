"""Prints the facts of a Ray head as JSON, for :func:`deploy.cluster.address.probe`: python -m deploy.cluster.probe HOST:PORT

It uses the client of Ray's control store, which needs no driver and starts nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_TIMEOUT_S = 10.0


def facts(address: str) -> dict[str, Any]:
    """Versions of a head, the number of its living nodes, and the one on this machine, or None.

    ``refused`` alone when the head needs a token other than this user's.
    """
    import ray._raylet as raylet
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private.services import find_node_ids
    from ray.exceptions import AuthenticationError

    try:
        client = raylet.GcsClient(address=address)  # pyright: ignore[reportAttributeAccessIssue]
    except AuthenticationError as error:
        return {"refused": str(error)}
    metadata = get_cluster_metadata(client)
    found = client.get_all_node_info(timeout=_TIMEOUT_S).values()
    nodes = {node.node_id.hex(): node for node in found if node.state == 0}  # GcsNodeInfo.ALIVE
    here = sorted(
        (node for node_id, node in nodes.items() if node_id in find_node_ids()),
        key=lambda node: not node.is_head_node,
    )
    first = (
        {"address": here[0].node_manager_address, "resources": dict(here[0].resources_total)}
        if here
        else None
    )
    return {
        "Ray": metadata["ray_version"],
        "Python": metadata["python_version"],
        "num_nodes": len(nodes),
        "here": first,
    }


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])))
