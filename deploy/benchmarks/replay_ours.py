"""This project's side of the benchmark ``replay``: a teacher worker whose states are ready, and a learner that only reads.

Both are Ray actors, and the replay index is a third. The producer is the real worker of a teacher actor: it takes draws
of teacher text at its desk, builds the row of each from the corpus, adds the payload, appends the row to its segment
store and delivers it. The consumer runs the real train loop: it leases the groups of an update, maps each row from the
segment files and views its states as a tensor.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.benchmarks.harness import BenchmarkFailed
from deploy.benchmarks.replay_rows import expected_touch, read_rows, touch, warm_memory
from deploy.benchmarks.simulated import cpu_s_of
from deploy.benchmarks.workload import open_store
from deploy.plan.engines import NoPushes
from distill.algorithm import train_loop
from distill.config import LearnerConfig, RecipeConfig, ReplayConfig, RunConfig, ScoringConfig
from distill.interfaces import Holder, Lease, Tokens
from distill.machine.remote import Remote
from distill.replay.past import IndexPast

MAX_POLICY_AGE = 3
"""How far the draws are ahead of the updates, as in the benchmark ``pipeline``."""


class ReadyTeacher:
    """A teacher that has computed the states of every text already."""

    def __init__(self, states: np.ndarray) -> None:
        self._states = iter(states)
        self.num_finished = 0

    async def hidden_states(self, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[np.ndarray]:
        self.num_finished += len(prompts)
        return list(itertools.islice(self._states, len(prompts)))

    async def close(self) -> None:
        pass


class Producer:
    """The process of the teacher actor."""

    def __init__(self, rows: str) -> None:
        columns = read_rows(rows)
        self._states = columns.pop("teacher_hidden")
        self._corpus = _corpus(**columns)

    def pid(self) -> int:
        return os.getpid()

    async def run(self, replay: Any, folder: str) -> float:
        """Serve the replay until its run is over; returns when the work began."""
        from actors.teacher import TeacherWorker

        holder = Holder("teacher", 0)
        worker = TeacherWorker(
            corpus=self._corpus,
            heldout_corpus=self._corpus,
            teacher=ReadyTeacher(self._states),
            store=open_store(folder, str(holder)),
            holder=holder,
            capacity=ScoringConfig().max_num_seqs,
            together=False,
            fills_payload=True,
        )
        service: Any = Remote(replay)
        start = time.perf_counter()
        await worker.run(service)
        return start


def _corpus(prompt_tokens: np.ndarray, response_tokens: np.ndarray) -> Any:
    """The corpus that the texts of the rows make."""
    import pyarrow as pa

    from distill.data.tables import TextCorpus
    from distill.schema import Trajectory, trajectory_batch

    rows = [
        Trajectory(
            draw_id=f"text-{index}",
            source="teacher",
            prompt_index=index,
            sample_index=0,
            prompt_tokens=prompt,
            response_tokens=response,
            finish_reason="length",
        )
        for index, (prompt, response) in enumerate(zip(prompt_tokens, response_tokens, strict=True))
    ]
    return TextCorpus(pa.Table.from_batches([trajectory_batch(rows)]))


class Consumer(NoPushes):
    """The process of the learner. It is the learner, the publisher and the milestones of its train loop."""

    def __init__(self) -> None:
        super().__init__()
        import torch  # noqa: F401 (before the clock runs)

        # A mapped row cannot be written to, and nothing here writes.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")

    def pid(self) -> int:
        return os.getpid()

    async def run(self, replay: Any, folder: str, num_updates: int) -> dict[str, Any]:
        """Train until the run is over; returns when the last row was read, and the sum of what was touched."""
        self._store = open_store(folder, "learner")
        self._sum, self._end = 0, 0.0
        service: Any = Remote(replay)
        await train_loop(service, self, self, self, updates_done=0, num_updates=num_updates, lock_step=False)
        del self._store  # its maps keep the memory of deleted files
        return {"end": self._end, "sum": self._sum}

    async def update(self, lease: Lease) -> dict[str, float]:
        from distill.machine.bfloat16 import from_bits
        from distill.schema import hidden_rows

        for group in lease.groups:
            for sample in group.samples:
                for bits in hidden_rows(self._store.read(sample)):
                    self._sum += touch(from_bits(bits))
        self._end = time.perf_counter()
        return {}


class OurTransfer:
    """The driver's end: producer and consumer live for all rounds, and each round has a replay of its own."""

    def __init__(self, cluster: Any, rows: Path, folder: Path) -> None:
        """``cluster``: a :class:`deploy.cluster.ray_cluster.RayCluster` that is open."""
        self._cluster = cluster
        self._rows = rows
        self._folder = folder
        self._names = ("producer", "consumer")
        self._producer = cluster.start_actor("producer", Producer, str(rows), num_threads=1)
        self._consumer = cluster.start_actor("consumer", Consumer, num_threads=1)

    def round(self, num_rows: int, rows_per_update: int) -> dict[str, float]:
        """Move the first rows; returns the seconds from the start of the producer to the last row that was read."""
        from actors.shells import ReplayActor

        num_updates = num_rows // rows_per_update
        config = RunConfig(
            recipe=RecipeConfig(student_text="none"),
            learner=LearnerConfig(num_updates=num_updates, teacher_rows_per_update=rows_per_update),
            replay=ReplayConfig(max_policy_age=MAX_POLICY_AGE),
        )
        replay = self._cluster.start_actor("replay", ReplayActor, config, 1, num_rows, num_threads=1)
        self._cluster.wait({"replay": replay.take_over.remote(IndexPast(state=None))})
        folder = self._folder / "ours"
        warm_memory(self._folder, num_rows)
        producer = [psutil.Process(self._cluster.actor_pid("producer"))]
        before = cpu_s_of(producer)
        try:
            found = self._cluster.wait(
                {
                    "producer": self._producer.run.remote(replay, str(folder)),
                    "consumer": self._consumer.run.remote(replay, str(folder), num_updates),
                },
                interval_s=0.2,
            )
        finally:
            self._cluster.end_actor("replay")
            shutil.rmtree(folder, ignore_errors=True)
        if found["consumer"]["sum"] != expected_touch(self._rows, num_rows):
            raise BenchmarkFailed("sum of what ours read", found["consumer"]["sum"], "be that of the rows")
        return {
            "seconds": found["consumer"]["end"] - found["producer"],
            "producer_cpu_s": cpu_s_of(producer) - before,
        }

    def pss_bytes(self) -> int:
        """Memory of producer and consumer between two rounds."""
        from deploy.cluster.memory import pss_bytes

        return sum(pss_bytes(self._cluster.actor_pid(name)) for name in self._names)
