"""What each actor of a run takes of its node: threads, and Ray's CPUs and GPUs. Pure functions of numbers.

A Ray that a run starts for itself serves only this run. Its actors state no resources there, and each sees every
device. In lock-step the roles take turns, so each role may use every core, which the actors of its pool divide.
Otherwise the learner may use every core and the engines divide them: they wait for it most of the time, and
an engine that holds a core for a while delays it little.

On a cluster, Ray has to know what a run takes, because other jobs share the node. In lock-step the actors still take
turns: each may use the whole budget of threads (the largest of ``num_threads``; null is every CPU of the node), and
each states an equal part of it, so that the parts add up to the budget. Otherwise the actors work at the same
time: each states its own ``num_threads``, and those with null divide the remaining CPUs equally. The replay actor
only answers short calls and states nothing.

A GPU belongs to one actor. The learner takes one if ``learner.device`` is ``cuda``, or is ``auto`` and the node has one;
an engine of a vLLM that computes on GPUs takes one per rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from distill.config import RunConfig
from distill.errors import ConfigError
from distill.interfaces import Role


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a Ray cluster, in Ray's numbers."""

    address: str
    num_cpus: float
    num_gpus: float
    free_cpus: float
    """CPUs that no other job has taken."""
    free_gpus: float
    num_others: int = 0
    """Living nodes of the cluster beside this one."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one actor takes."""

    num_threads: int
    num_cpus: float = 0.0
    num_gpus: int = 0


Placement = Mapping[str, Share]
"""The share of one actor of each role. A run starts ``rollout`` or ``sampler``; ``corpus`` has ended before that."""


def place_locally(config: RunConfig, num_cores: int) -> Placement:
    """The shares on a Ray, or in a process, that serves only this run. ``num_cores``: cores that it may use."""
    replicas = _replicas(config)
    engines = sum(replicas.values()) - 1
    shares: dict[str, Share] = {}
    for role, threads in _threads(config).items():
        apart = replicas[role] if config.replay.lock_step or role == "learner" else engines
        shares[role] = Share(num_threads=threads or max(1, num_cores // apart))
    alone = Share(num_threads=config.rollout.num_threads or num_cores)
    return {**_by_actor(shares), "corpus": alone}


def place_on_node(config: RunConfig, num_cores: int, node: Node, *, vllm_on_gpu: bool) -> Placement:
    """The shares on a node of a cluster, whose process may use ``num_cores``.

    ``vllm_on_gpu``: whether the installed vLLM computes on GPUs.

    Raises: ConfigError when the node has less than the actors take, or other jobs have taken too much of it.
    """
    cpus = min(math.floor(node.num_cpus), num_cores)
    shares = _in_turns(config, cpus) if config.replay.lock_step else _together(config, cpus)
    gpus = _gpus(config, has_gpu=node.num_gpus >= 1, vllm_on_gpu=vllm_on_gpu)
    shares = {role: replace(share, num_gpus=gpus[role]) for role, share in shares.items()}
    for violation in _violations(shares, _replicas(config), node):
        raise violation
    return _by_actor(shares)


def with_threads(config: RunConfig, placement: Placement) -> RunConfig:
    """The configuration with the threads of ``placement`` where it had null."""
    return replace(
        config,
        learner=replace(config.learner, num_threads=placement["learner"].num_threads),
        rollout=replace(config.rollout, num_threads=placement["rollout"].num_threads),
        scoring=replace(config.scoring, num_threads=placement["teacher"].num_threads),
    )


def threads_on_cores(
    config: RunConfig, placement: Placement, *, has_gpu: bool, vllm_on_gpu: bool
) -> dict[str, int]:
    """The threads of one actor of each role that computes on the node's cores. ``has_gpu``: whether the node has one."""
    gpus = _gpus(config, has_gpu=has_gpu, vllm_on_gpu=vllm_on_gpu)
    return {
        role: placement[role].num_threads for role, count in gpus.items() if not count and role in placement
    }


def require_room(share: Share, count: int, node: Node, setting: str) -> None:
    """Check that a node has room for more actors. ``setting``: what asks for them, in errors.

    Raises: ConfigError when other actors and jobs have left too little.
    """
    for unit, each, free in (
        ("CPUs", share.num_cpus, node.free_cpus),
        ("GPUs", float(share.num_gpus), node.free_gpus),
    ):
        if count * each > free:
            must = f"fit the free {unit} of the Ray node {node.address}: {count} more actors take {count * each:g} of {free:g}"
            raise ConfigError(setting, count, must, "add fewer, or wait until other jobs have ended")


def described(placement: Placement) -> str:
    """What the actors take, for the user; actors that take nothing and other names of the same actor are left out."""
    shares = {name: share for name, share in placement.items() if name not in ("sampler", "corpus")}
    parts = [f"{name} {_shown(share)}" for name, share in shares.items() if share.num_cpus or share.num_gpus]
    return ", ".join(parts) or "no reserved CPUs"


def num_engines(config: RunConfig) -> dict[Role, int]:
    """The number of actors in each pool. The scorers of a proxy are a pool beside one teacher for the evaluations."""
    rollouts = config.rollout.replicas if config.recipe.uses_student_text else 1
    if config.recipe.teacher_gives == "probabilities":
        return {"rollout": rollouts, "teacher": config.scoring.replicas}
    return {"rollout": rollouts, "teacher": 1, "proxy": config.scoring.replicas}


def pool_violations(config: RunConfig, num_cores: int) -> Iterator[ConfigError]:
    """The pools that are larger than the machine, if engines compute on its CPU."""
    for name, count in (
        ("rollout.replicas", config.rollout.replicas),
        ("scoring.replicas", config.scoring.replicas),
    ):
        if count > num_cores:
            yield ConfigError(
                name, count, f"be <= {num_cores}, the cores that the run may use, because each actor needs one",
                "lower it",
            )  # fmt: skip


def _replicas(config: RunConfig) -> dict[str, int]:
    return {"learner": 1, **num_engines(config)}


def _threads(config: RunConfig) -> dict[str, int | None]:
    """The setting of each role. The proxy is a second scorer, and exists if the teacher gives only text."""
    threads = {"learner": config.learner.num_threads, "rollout": config.rollout.num_threads}
    threads["teacher"] = config.scoring.num_threads
    if config.recipe.teacher_gives != "probabilities":
        threads["proxy"] = config.scoring.num_threads
    return threads


def _in_turns(config: RunConfig, cpus: int) -> dict[str, Share]:
    """The shares of actors of which one works at a time."""
    replicas = _replicas(config)
    threads = {role: count or max(1, cpus // replicas[role]) for role, count in _threads(config).items()}
    budget = max(threads[role] * replicas[role] for role in threads)
    part = _rounded_down(budget / sum(replicas.values()))
    return {role: Share(num_threads=count, num_cpus=part) for role, count in threads.items()}


def _together(config: RunConfig, cpus: int) -> dict[str, Share]:
    """The shares of actors that all work at the same time."""
    threads, replicas = _threads(config), _replicas(config)
    left = cpus - sum((count or 0) * replicas[role] for role, count in threads.items())
    unset = sum(replicas[role] for role, count in threads.items() if count is None)
    # Without any CPU left, one each is stated, so that the node is refused with the number that it lacks.
    part = _rounded_down(left / unset) if unset and left > 0 else 1.0
    return {
        role: Share(num_threads=count or max(1, math.floor(part)), num_cpus=float(count or part))
        for role, count in threads.items()
    }


def _rounded_down(cpus: float) -> float:
    """The number with the four decimals that Ray keeps."""
    return math.floor(cpus * 10_000) / 10_000


def _gpus(config: RunConfig, *, has_gpu: bool, vllm_on_gpu: bool) -> dict[str, int]:
    """The number of GPUs of each role."""
    device = config.learner.device
    gpus = {"learner": int(device == "cuda" or (device == "auto" and has_gpu))}
    for role, engine in (
        ("rollout", config.rollout),
        ("teacher", config.scoring),
        ("proxy", config.scoring),
    ):
        on_gpu = vllm_on_gpu and engine.engine == "vllm"
        gpus[role] = engine.tensor_parallel_size if on_gpu else 0
    return gpus


def _violations(
    shares: Mapping[str, Share], replicas: Mapping[str, int], node: Node
) -> Iterator[ConfigError]:
    """What the node lacks: at all, and at the moment."""
    smaller = {
        "CPUs": "lower num_threads and replicas of learner, rollout and scoring",
        "GPUs": "set learner.device=cpu, or lower replicas and tensor_parallel_size",
    }
    others = "; the other nodes are not used yet, so" if node.num_others else ", or"
    for unit, has, free in (
        ("CPUs", node.num_cpus, node.free_cpus),
        ("GPUs", node.num_gpus, node.free_gpus),
    ):
        by_role = {
            role: replicas[role] * (share.num_cpus if unit == "CPUs" else float(share.num_gpus))
            for role, share in shares.items()
        }
        wanted = sum(by_role.values())
        parts = ", ".join(f"{role} {count:g}" for role, count in by_role.items() if count)
        if wanted > has:
            must = f"be >= {wanted:g}, which the actors take ({parts}) on the driver's node"
            remedy = f"{smaller[unit]}{others} start the run on a larger node"
            yield ConfigError(f"{unit} of the Ray node {node.address}", f"{has:g}", must, remedy)
        if wanted > free:
            must = f"be >= {wanted:g}, which the actors take ({parts}); other jobs have {has - free:g} of {has:g}"
            remedy = f"wait until they have ended, or {smaller[unit]}"
            yield ConfigError(f"free {unit} of the Ray node {node.address}", f"{free:g}", must, remedy)


def _by_actor(shares: Mapping[str, Share]) -> Placement:
    """The shares by the names of the actors."""
    sampler = shares["rollout"]
    return {**shares, "sampler": sampler, "corpus": sampler, "replay": Share(num_threads=1)}


def _shown(share: Share) -> str:
    gpus = f" and {share.num_gpus} GPU{'s' if share.num_gpus > 1 else ''}" if share.num_gpus else ""
    return f"{share.num_cpus:g} CPU{'' if share.num_cpus == 1 else 's'}{gpus}"
