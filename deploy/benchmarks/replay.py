"""Benchmark ``replay``: insert, lease and map scored trajectories across processes.

2,000 trajectories of 64 prompt and 256 response tokens, whose teacher states are 256 x 576 bfloat16, pass from a
process that has the states to a process that views them as tensors and reads from every page. Ours is
:mod:`deploy.benchmarks.replay_ours`: the worker of the teacher actor, the segment store, the replay actor and the
train loop. Theirs are a memory copy and pickled rows in Ray (:mod:`deploy.benchmarks.replay_floor`), TransferQueue
(:mod:`deploy.benchmarks.replay_transferqueue`) and TorchRL (:mod:`deploy.benchmarks.replay_torchrl`), the last three
each in the fastest of three batch sizes. Every side reports the seconds from its first insert to its last read, and a
sum over what was read proves that it moved the same states.

Ours moves row by row, because a teacher finishes row by row; the peers are given whole batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from deploy.benchmarks.harness import Measurement, Pair, Say, alternate
from deploy.benchmarks.replay_floor import OBJECT_STORE_BYTES, Floors
from deploy.benchmarks.replay_ours import OurTransfer
from deploy.benchmarks.replay_peers import (
    OWN_BATCH,
    OWN_FIELDS,
    OWN_LENGTH,
    VERSIONS,
    fastest_batch,
    torchrl,
    transfer_queue,
)
from deploy.benchmarks.replay_rows import NUM_STATES, STATE_BYTES, WIDTH, write_rows
from deploy.benchmarks.workload import scratch
from distill.config import ClusterConfig

NUM_ROWS, ROWS_PER_UPDATE = 2000, 100
OWN_ROWS_PER_UPDATE = 128
BATCHES = (100, 500, 2000)

Round = Mapping[str, Mapping[str, float]]


def measure(num_pairs: int, say: Say) -> Measurement:
    """Start every side, find the fastest batches of the peers, then alternate."""
    return _measure(num_pairs, say, NUM_ROWS, ROWS_PER_UPDATE, BATCHES)


def _measure(
    num_pairs: int, say: Say, num_rows: int, rows_per_update: int, batches: Sequence[int]
) -> Measurement:
    from deploy.cluster.ray_cluster import RayCluster

    with scratch() as folder, ExitStack() as stack:
        write_rows(folder, max(num_rows, OWN_BATCH))
        queue = transfer_queue(folder, folder, say)
        stack.callback(queue.side.close)
        buffer = torchrl(folder, folder, num_rows, say)
        stack.callback(buffer.side.close)
        config = ClusterConfig(address="local", object_store_bytes=OBJECT_STORE_BYTES)
        cluster = stack.enter_context(RayCluster(config, "bbbbbbbb"))
        ours, floors = OurTransfer(cluster, folder, folder), Floors(cluster, folder, folder)
        batch, tried = {}, {}
        for name, round_of in {
            "transferqueue": lambda size: queue.round(num_rows, size),
            "torchrl": lambda size: buffer.round(num_rows, size),
            "pickle": lambda size: floors.pickle(num_rows, size),
        }.items():
            batch[name], tried[name] = fastest_batch(round_of, batches, say, name)
        sides = {
            "ours": lambda: ours.round(num_rows, rows_per_update),
            "memcpy": lambda: floors.memcpy(num_rows),
            "transferqueue": lambda: queue.round(num_rows, batch["transferqueue"]),
            "torchrl": lambda: buffer.round(num_rows, batch["torchrl"]),
            "pickle": lambda: floors.pickle(num_rows, batch["pickle"]),
            "ours_own": lambda: ours.round(OWN_BATCH, OWN_ROWS_PER_UPDATE),
            "transferqueue_own": queue.own,
        }
        say("warm-up")
        for side in sides.values():
            side()
        rounds = alternate(num_pairs, sides, say)
        memory = {
            "ours": ours.pss_bytes(),
            "memcpy and pickle": floors.pss_bytes(),
            "transferqueue": queue.side.pss_bytes(),
            "torchrl": buffer.side.pss_bytes(),
        }
    return Measurement(
        pairs=_pairs(rounds, num_rows),
        notes={
            "num_trajectories": num_rows,
            "state_bytes": num_rows * STATE_BYTES,
            "state_bytes_per_trajectory": NUM_STATES * WIDTH * 2,
            "trajectories_per_update": rows_per_update,
            "seconds": {name: [found[name]["seconds"] for found in rounds] for name in sides},
            "producer_cpu_s": [found["ours"]["producer_cpu_s"] for found in rounds],
            "memcpy_copy_s": [found["memcpy"]["copy_s"] for found in rounds],
            "memcpy_map_s": [found["memcpy"]["map_s"] for found in rounds],
            "seconds_by_batch": tried,
            "batch": batch,
            "pss_bytes": memory,
        },
        versions=VERSIONS,
    )


def _pairs(rounds: Sequence[Round], num_rows: int) -> dict[str, list[Pair]]:
    """Trajectories per second; for ``transferqueue_own``, whose rows are not trajectories, bytes per second."""
    pairs = {
        peer: [(num_rows / found["ours"]["seconds"], num_rows / found[peer]["seconds"]) for found in rounds]
        for peer in ("memcpy", "transferqueue", "torchrl", "pickle")
    }
    ours, theirs = OWN_BATCH * STATE_BYTES, OWN_BATCH * OWN_FIELDS * OWN_LENGTH * 4
    pairs["transferqueue_own"] = [
        (ours / found["ours_own"]["seconds"], theirs / found["transferqueue_own"]["seconds"])
        for found in rounds
    ]
    return pairs
