"""What the stages of a run share: a backend with the learner on it, the record, and the live line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from deploy.cluster.backend import Backend
from deploy.cluster.in_process import InProcess
from deploy.cluster.memory import MemorySampler
from deploy.cluster.ray_cluster import RayCluster
from deploy.placement import (
    Node,
    Placement,
    place_locally,
    place_on_node,
    require_room,
    threads_on_cores,
    with_threads,
)
from deploy.run.progress import Progress
from deploy.run.record import RunRecord
from deploy.run.training.advice import Setup
from deploy.run.training.clocks import STAGES
from deploy.run.training.restarts import RestartBudget
from deploy.run.training.room import Room
from deploy.run.vllm_build import vllm_computes_on_gpu
from distill.config import ClusterConfig, RunConfig
from distill.errors import first_line
from distill.machine.hardware import usable_cores


class RunContext:
    """Starts actors, waits for them, and attributes memory to them. The learner starts with the context."""

    def __init__(
        self,
        config: RunConfig,
        record: RunRecord,
        progress: Progress,
        backend: Backend,
        memory: MemorySampler,
    ) -> None:
        self.config = config
        self.record = record
        self.progress = progress
        self.backend = backend
        self.restarts = RestartBudget(config.cluster)
        self.room = Room(config.checkpoint.wait_for_room_s, progress.say, record.event)
        self._memory = memory
        self._placement = _place(config, backend)
        self._started: set[str] = set()
        self.config = config = with_threads(config, self._placement)  # the actors read their threads there
        self.start_learner()

    def start_learner(self) -> None:
        """Start the learner, which has no model yet, in place of the one before it, whose processes are killed."""
        from learner.process.shell import LearnerActor

        self.backend.kill_actor("learner")
        self.learner = self.start_actor("learner", LearnerActor, self.config)

    def setup(self) -> Setup:
        """What an advice needs to know of the run."""
        return setup_of(self.config, self._placement, self.backend.node())

    def require_room(self, role: str, count: int, setting: str) -> None:
        """Check that ``count`` more actors of a role can start. Raises: ConfigError."""
        node = self.backend.node()
        if node is not None:
            require_room(self._placement[role], count, node, setting)

    def memory(self) -> dict[str, int]:
        """Bytes of the processes of each role at the last sample."""
        return self._memory.newest()

    @property
    def corpus_config(self) -> RunConfig:
        """The configuration of the actor that writes corpora, which has more threads than a rollout actor."""
        threads = self._placement["corpus"].num_threads
        return replace(self.config, rollout=replace(self.config.rollout, num_threads=threads))

    def start_actor(
        self, name: str, actor_class: Any, *args: object, role: str | None = None, revives: bool = False
    ) -> Any:
        """Start an actor with the share of its role, which is its name unless there is another; returns its handle."""
        share = self._placement[role or name]
        handle = self.backend.start_actor(
            name,
            actor_class,
            *args,
            num_threads=share.num_threads,
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus,
            revives=revives,
        )
        self._started.add(name)
        self._note_started(name, role)
        return handle

    def kill_actors(self) -> None:
        """Kill the processes of all actors that were started here and have not ended."""
        for name in self._started:
            self.backend.kill_actor(name)
        self._started.clear()

    def revive_actor(self, name: str) -> None:
        """Kill the process of an actor that revives, and wait for its successor."""
        self.backend.revive_actor(name)
        self._note_started(name, None)

    def note_damage(self, state: dict[str, Any] | None) -> None:
        """Say which checkpoints were passed over when the learner loaded the one with this state."""
        if state is None:
            return
        updates_done = state["updates_done"]
        for damage in state["damaged"]:
            self.record.event("checkpoint_damaged", damage=damage, used=updates_done)
            self.progress.say(
                f"warning: {damage}; the checkpoint after update {updates_done} is used instead"
            )

    def note_failure(self, actor: str, error: Exception, then: str) -> None:
        """Say that an actor has failed. ``then``: what happens next."""
        self.record.event("member_failed", member=actor, error=str(error))
        self.progress.say(f"warning: {first_line(error)}; {then}")

    def note_replaced(self, actor: str, heir: str, seconds: float, loading_s: float = 0.0) -> None:
        """Say that an actor which has failed works again.

        ``seconds``: since the failure was noticed; ``loading_s``: of these, those that the start of the heir's process
        and the load of its model took.
        """
        self.record.event(
            "member_replaced",
            member=actor,
            heir=heir,
            seconds=round(seconds, 2),
            loading_s=round(loading_s, 2),
        )
        does = "works again" if heir == actor else f"has taken the place of {actor}"
        self.progress.say(f"{heir} {does} after {seconds:.0f} s")

    def _note_started(self, name: str, role: str | None) -> None:
        pid = self.backend.actor_pid(name)
        self.record.event("actor_started", actor=name, pid=pid)
        if pid is not None:
            self._memory.add(role or name, pid)

    def wait_briefly(self, calls: dict[str, Any]) -> dict[str, Any]:
        """Wait at most ``cluster.start_timeout_s`` for one call per actor; returns the results by actor."""
        return self.backend.wait(calls, timeout_s=self.config.cluster.start_timeout_s)


@contextmanager
def run_context(config: RunConfig, record: RunRecord, progress: Progress) -> Iterator[RunContext]:
    """Start the backend and the memory sampler. A run that succeeds has its peaks of memory in the record."""
    with ExitStack() as stack:
        with record.timed("start_backend"):
            backend = stack.enter_context(_backend(config.cluster, record.folder.run_id))
        memory = stack.enter_context(MemorySampler({"driver": os.getpid()}))
        for pid in backend.service_pids():
            memory.add("ray", pid)
        yield RunContext(config, record, progress, backend, memory)
        record.peak_pss_bytes = memory.stop()


def setup_of(config: RunConfig, placement: Placement, node: Node | None) -> Setup:
    """What an advice needs to know of a placed run. ``node``: that of a cluster; None for this machine."""
    from torch.cuda import is_available

    has_gpu = node.num_gpus >= 1 if node is not None else is_available()
    threads = threads_on_cores(config, placement, has_gpu=has_gpu, vllm_on_gpu=vllm_computes_on_gpu())
    return Setup(
        max_policy_age=config.replay.max_policy_age,
        num_cores=usable_cores() if node is None else min(usable_cores(), int(node.num_cpus)),
        num_threads={role: count for role, count in threads.items() if role in STAGES},
        uses_student_text=config.recipe.uses_student_text,
    )


def _place(config: RunConfig, backend: Backend) -> Placement:
    """What each actor takes. Raises: ConfigError when the node of a cluster has too little."""
    node = backend.node()
    if node is None:
        return place_locally(config, usable_cores())
    return place_on_node(config, usable_cores(), node, vllm_on_gpu=vllm_computes_on_gpu())


def _backend(config: ClusterConfig, run_id: str) -> Backend:
    return RayCluster(config, run_id) if config.backend == "ray" else InProcess(run_id)
