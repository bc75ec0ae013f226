"""Settings of the machinery: engines, replay, weight push, checkpoints, Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distill.config.rules import bounded
from distill.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sampling of student text: always at temperature 1 and without top-p, because the objective is an
    expectation over the policy itself."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What samples. transformers: for machines without vLLM and for tiny models."""
    samples_per_prompt: int = 2
    """Responses per draw: the size of a group."""
    max_new_tokens: int = 64
    """Longest response."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the engine; auto: bfloat16 where the processor computes in it, else float32."""
    tensor_parallel_size: int = 1
    """Ranks that share one copy of the model."""
    num_threads: int | None = None
    """CPU threads; null: all cores of the machine."""
    kv_cache_gib: float = 1.0
    """Key-value cache of the CPU engine, in GiB."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU for weights and cache. Not used on a CPU."""
    max_num_seqs: int = 64
    """Sequences decoded together."""

    def violations(self) -> Iterator[ConfigError]:
        counts = (
            "samples_per_prompt",
            "max_new_tokens",
            "tensor_parallel_size",
            "num_threads",
            "max_num_seqs",
        )
        yield from bounded("rollout", self, ">= 1", *counts)
        yield from bounded("rollout", self, "> 0", "kv_cache_gib")
        yield from bounded("rollout", self, "(0, 1]", "gpu_memory_utilization")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Teacher scoring."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What scores."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the engine."""
    tensor_parallel_size: int = 1
    """Ranks that share one copy of the teacher."""
    num_threads: int | None = None
    """CPU threads; null: all cores of the machine."""
    kv_cache_gib: float = 0.5
    """Key-value cache of the CPU engine, in GiB."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU for weights and cache. Not used on a CPU."""
    max_groups: int = 64
    """Groups scored in one call."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("scoring", self, ">= 1", "tensor_parallel_size", "num_threads", "max_groups")
        yield from bounded("scoring", self, "> 0", "kv_cache_gib")
        yield from bounded("scoring", self, "(0, 1]", "gpu_memory_utilization")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The buffer between actors and learner, in Reverb's words."""

    samples_per_insert: float = 1.0
    """How often a student group is used on average."""
    max_times_sampled: int = 1
    """How often a student group may be used. Corpus text has no such bound."""
    min_size_to_sample: int = 0
    """Scored student groups that must be there before one is sampled."""
    max_policy_age: int = 0
    """Bound of a group's age when used, in updates, by its oldest token. 0 is lock-step:
    deterministic, generation and training in turn."""
    memory_bytes: int = 1 << 30
    """Segments kept in shared memory per node; older ones are moved to the run folder."""
    max_bytes: int = 8 << 30
    """Bound of the buffer, shared memory and disk together; corpus payload is evicted over it."""
    segment_bytes: int = 32 << 20
    """A segment file is closed at this size."""

    @property
    def lock_step(self) -> bool:
        return self.max_policy_age == 0

    def violations(self) -> Iterator[ConfigError]:
        if self.max_policy_age < 0:
            yield ConfigError("replay.max_policy_age", self.max_policy_age, "be >= 0", "0 is lock-step")
        if self.samples_per_insert <= 0:
            yield ConfigError(
                "replay.samples_per_insert", self.samples_per_insert, "be > 0", "1 uses each group once"
            )
        if self.max_times_sampled < self.samples_per_insert:
            yield ConfigError(
                "replay.max_times_sampled",
                self.max_times_sampled,
                f"be >= replay.samples_per_insert ({self.samples_per_insert})",
                "otherwise groups run out and the learner waits forever; raise it or lower samples_per_insert",
            )
        if self.max_policy_age == 0 and self.samples_per_insert != 1:
            yield ConfigError(
                "replay.samples_per_insert",
                self.samples_per_insert,
                "be 1 when replay.max_policy_age=0",
                "a re-used group is older than 0 updates; raise max_policy_age",
            )
        yield from bounded("replay", self, ">= 0", "min_size_to_sample")
        yield from bounded("replay", self, ">= 4096", "segment_bytes", "memory_bytes", "max_bytes")
        if self.segment_bytes > self.memory_bytes:
            yield ConfigError(
                "replay.segment_bytes",
                self.segment_bytes,
                f"be <= replay.memory_bytes ({self.memory_bytes})",
                "lower it",
            )
        if self.memory_bytes > self.max_bytes:
            yield ConfigError(
                "replay.memory_bytes",
                self.memory_bytes,
                f"be <= replay.max_bytes ({self.max_bytes})",
                "raise max_bytes or lower memory_bytes",
            )


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """The push of the learner's weights into the engines."""

    on_push: Literal["recompute", "keep_kv"] = "recompute"
    """What becomes of requests in flight: their caches are dropped and filled again under the
    new weights, or kept (prefix caching is then off)."""
    deadline_s: float = 120.0
    """A push that takes longer fails the run."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("weights", self, "> 0", "deadline_s")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Resumable state."""

    every: int = 10
    """Updates between checkpoints; the last update always makes one."""
    keep: int = 2
    """Newest checkpoints kept."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("checkpoint", self, ">= 1", "every", "keep")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the actors run."""

    backend: Literal["ray", "in_process"] = "ray"
    """ray: a process for every actor; in_process: all in one, for tiny models and the
    transformers engines."""
    address: str | None = None
    """Ray address; null: a local single-node Ray of this run alone."""
    object_store_bytes: int = 128 << 20
    """Object store of a local Ray; rows do not pass through it."""
    start_timeout_s: float = 600.0
    """How long an actor may take to load its model."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("cluster", self, "> 0", "start_timeout_s")
        if self.object_store_bytes < 80 << 20:
            yield ConfigError(
                "cluster.object_store_bytes",
                self.object_store_bytes,
                "be >= 83886080 (Ray's least)",
                "134217728 is the default",
            )
