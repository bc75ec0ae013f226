"""A run without computation: the real replay and Ray, and engines that only wait.

Many engines live in one light process, as asyncio clients with a desk each. The learner and the pushes are waits
in the driver, which runs the real train loop.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from distill.algorithm import train_loop
from distill.config import LearnerConfig, RecipeConfig, ReplayConfig, RolloutConfig, RunConfig, ScoringConfig
from distill.interfaces import Draw, Holder, Lease, Location, Role, SampleRef, WeightManifest, Work
from distill.machine.remote import Remote
from distill.replay.desk import Desk

MAX_PROCESSES = 8
_NEWEST = 1 << 60


@dataclass(frozen=True, kw_only=True)
class Load:
    """How many engines there are, and how long each piece of work takes."""

    num_rollouts: int
    num_teachers: int
    prompts_per_update: int
    num_updates: int
    max_policy_age: int
    rollout_s: float
    """Seconds of one rollout in one engine, which has one at a time."""
    teacher_s: float
    update_s: float
    push_s: float

    @property
    def rates(self) -> dict[str, float]:
        """Trajectories per second that each stage could do alone."""
        return {
            "rollout": self.num_rollouts / self.rollout_s if self.rollout_s else float("inf"),
            "teacher": self.num_teachers / self.teacher_s if self.teacher_s else float("inf"),
            "learner": self.prompts_per_update / self.update_s if self.update_s else float("inf"),
        }

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            recipe=RecipeConfig(student_text="every_update", teacher_text="none"),
            learner=LearnerConfig(num_updates=self.num_updates, prompts_per_update=self.prompts_per_update),
            replay=ReplayConfig(max_policy_age=self.max_policy_age),
            rollout=RolloutConfig(samples_per_prompt=1, replicas=self.num_rollouts),
            scoring=ScoringConfig(replicas=self.num_teachers),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated run took."""

    trajectories_per_s: float
    """Without the time in which the pipeline fills."""
    cpu_s: dict[str, float]
    """CPU seconds per trajectory of the driver, the replay actor, and Ray's own processes; the engines' do not count."""

    @property
    def cpu_s_per_trajectory(self) -> float:
        return sum(self.cpu_s.values())


class Engines:
    """A process with some engines of one kind."""

    def pid(self) -> int:
        return os.getpid()

    async def run(self, replay: Any, role: Role, numbers: Sequence[int], seconds: float) -> None:
        """Work until the run is over."""
        service: Any = Remote(replay)
        await asyncio.gather(*(_engine(service, Holder(role, number), seconds) for number in numbers))


class _NoStore:
    def settle(self, samples: Sequence[SampleRef]) -> None:
        pass


async def _engine(replay: Any, holder: Holder, seconds: float) -> None:
    """An engine that has one piece of work at a time; in lock-step its whole share, one piece after the other."""
    desk = Desk(replay, holder, _NoStore(), capacity=1)
    async for work in desk:
        await asyncio.sleep(seconds * len(work))
        done = [_finished(each, holder) for each in work]
        desk.deliver(done)


def _finished(work: Work, holder: Holder) -> SampleRef:
    # A version that the index does not know counts as the newest one.
    draw, version = (work, _NEWEST) if isinstance(work, Draw) else (work.draw, work.oldest_version)
    location = Location(
        node="n", segment=f"{holder}-0.arrow", offset=0, num_bytes=1, trajectory_id=draw.draw_id
    )
    return SampleRef(draw=draw, sample=0, location=location, num_tokens=1, oldest_version=version)


class NoPushes:
    """Publisher and milestones of a run that has neither."""

    def __init__(self) -> None:
        self._version = 0

    async def write(self, updates_done: int) -> WeightManifest:
        self._version += 1
        return WeightManifest(
            policy_version=self._version, update=updates_done, path="", num_bytes=0, checksum=""
        )

    async def send(self, manifest: WeightManifest) -> None:
        pass

    async def before_training(self, updates_done: int, policy_version: int) -> None:
        pass

    def samples_after(self, updates_done: int) -> bool:
        return False

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        pass


class _Waits(NoPushes):
    """Learner, publisher and milestones of a simulated run."""

    def __init__(self, load: Load) -> None:
        super().__init__()
        self._load = load
        self._ended: list[float] = []
        """When each update had ended."""

    async def update(self, lease: Lease) -> dict[str, float]:
        await asyncio.sleep(self._load.update_s)
        return {}

    async def send(self, manifest: WeightManifest) -> None:
        await asyncio.sleep(self._load.push_s)

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None:
        self._ended.append(time.perf_counter())

    @property
    def steady(self) -> tuple[int, float]:
        """Updates after the first quarter of the run, in which the pipeline fills, and their seconds."""
        first = len(self._ended) // 4
        return len(self._ended) - 1 - first, self._ended[-1] - self._ended[first]


def simulate(cluster: Any, load: Load) -> Outcome:
    """Run once on a :class:`deploy.cluster.ray_cluster.RayCluster` that is open."""
    from actors.shells import ReplayActor

    config = load.config
    replay = cluster.start_actor("replay", ReplayActor, config, 100_000, 0, num_threads=1)
    names = ["replay"]
    calls: list[Any] = []
    pools: tuple[tuple[Role, int, float], ...] = (
        ("rollout", load.num_rollouts, load.rollout_s),
        ("teacher", load.num_teachers, load.teacher_s),
    )
    for role, count, seconds in pools:
        processes = min(MAX_PROCESSES // 2, count)
        for number in range(processes):
            name = f"{role}-engines-{number}"
            actor = cluster.start_actor(name, Engines, num_threads=1)
            names.append(name)
            numbers = list(range(number, count, processes))
            calls.append(actor.run.remote(replay, role, numbers, seconds))
    control = {
        "driver": [psutil.Process()],
        "replay": [psutil.Process(cluster.actor_pid("replay"))],
        "ray": [psutil.Process(pid) for pid in cluster.service_pids()],
    }
    try:
        before = {name: cpu_s_of(processes) for name, processes in control.items()}
        num_updates, seconds = asyncio.run(_train(load, replay, calls))
        spent = {name: cpu_s_of(processes) - before[name] for name, processes in control.items()}
    finally:
        for name in names:
            cluster.end_actor(name)
    return Outcome(
        trajectories_per_s=load.prompts_per_update * num_updates / seconds,
        cpu_s={name: cpu_s / (load.prompts_per_update * load.num_updates) for name, cpu_s in spent.items()},
    )


async def _train(load: Load, replay: Any, calls: Sequence[Any]) -> tuple[int, float]:
    service: Any = Remote(replay)
    waits = _Waits(load)
    await train_loop(
        service,
        waits,
        waits,
        waits,
        updates_done=0,
        num_updates=load.num_updates,
        lock_step=load.config.replay.lock_step,
    )
    await asyncio.gather(*calls)
    return waits.steady


def cpu_s_of(processes: Sequence[psutil.Process]) -> float:
    """CPU seconds of some processes so far."""
    total = 0.0
    for process in processes:
        times = process.cpu_times()
        total += times.user + times.system
    return total
