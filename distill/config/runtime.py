"""Settings of the machinery: engines, replay buffer, weight pushes, checkpoints, processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from distill.config.retired import RETIRED
from distill.config.rules import bounded
from distill.config.written import NULL
from distill.errors import ConfigError, did_you_mean

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The engine that samples student text and, before training, the corpus of teacher text. Sampling is always
    at temperature 1 and without top-p, because the objective is an expectation over the policy itself."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """Library that samples. ``transformers`` is for machines without vLLM and for tiny models."""
    replicas: int = 1
    """Number of rollout actors. Each has a copy of the student."""
    samples_per_prompt: int = 2
    """Number of responses per prompt, which form a group."""
    max_new_tokens: int = 64
    """Longest response, in tokens."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the engine. ``auto``: bfloat16 if the processor computes in it natively, otherwise
    float32."""
    tensor_parallel_size: int = 1
    """Number of ranks that share one copy of the model."""
    num_threads: int | None = None
    """Number of CPU threads. null: as many as the cores that the process may use."""
    kv_cache_gib: float = 1.0
    """Size of the key-value cache in GiB. Not used on a GPU."""
    gpu_memory_utilization: float = 0.85
    """Fraction of the GPU's memory for weights and key-value cache. Not used on a CPU."""
    max_num_seqs: int = 64
    """Largest number of sequences that are decoded together. The corpus of teacher text is sampled 128 at a time,
    whatever this is."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("rollout", self, ">= 1", "samples_per_prompt", "max_new_tokens", "max_num_seqs")
        yield from _engine_violations("rollout", self)


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """The engine that computes the hidden states of the teacher, or of its proxy, before every response token."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """Library that scores. ``transformers`` is for machines without vLLM and for tiny models."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the engine. ``auto``: bfloat16 if the processor computes in it natively, otherwise
    float32."""
    tensor_parallel_size: int = 1
    """Number of ranks that share one copy of the teacher."""
    num_threads: int | None = None
    """Number of CPU threads. null: as many as the cores that the process may use."""
    kv_cache_gib: float = 0.5
    """Size of the key-value cache in GiB. Not used on a GPU."""
    gpu_memory_utilization: float = 0.85
    """Fraction of the GPU's memory for weights and key-value cache. Not used on a CPU."""
    replicas: int = 1
    """Number of teacher actors, or of the proxy's where there is one. Each has a copy of the model."""
    max_num_seqs: int = 64
    """Largest number of texts that an actor scores at a time. It has no effect in lock-step
    (``replay.max_policy_age=0``), where a call scores an actor's share of an update."""
    check: int = 4
    """Number of held-out texts of the teacher on which a run, when it starts, compares the probabilities that the
    learner computes for the teacher with those that the engine sampled from. A total variation above 0.05 ends
    the run. 0: no check."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("scoring", self, ">= 1", "max_num_seqs")
        yield from bounded("scoring", self, ">= 0", "check", remedy="set it to 0 to leave the check out")
        yield from _engine_violations("scoring", self)


def _engine_violations(section: str, part: RolloutConfig | ScoringConfig) -> Iterator[ConfigError]:
    """The rules that both engines share."""
    yield from bounded(section, part, ">= 1", "replicas", "tensor_parallel_size", "num_threads")
    yield from bounded(section, part, "> 0", "kv_cache_gib")
    yield from bounded(section, part, "(0, 1]", "gpu_memory_utilization")


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The replay buffer between actors and learner. Its settings are named as in DeepMind's Reverb."""

    samples_per_insert: float = 1.0
    """Average number of times that a group of student text is used."""
    max_times_sampled: int = 1
    """Largest number of times that a group of student text is used. Teacher text has no such limit."""
    min_size_to_sample: int = 0
    """Number of scored student groups that the buffer must contain before one is sampled."""
    max_policy_age: int = 0
    """Largest age of a group when it is used: the number of updates since its oldest token was sampled.
    0: lock-step, in which generation and training take turns and the run is deterministic."""
    memory_bytes: int = 1 << 30
    """Bytes of segment files that each node keeps in shared memory. Older segments are moved to the run folder."""
    max_bytes: int = 8 << 30
    """Largest size of the buffer in bytes, in shared memory and on disk together. Above it, scored teacher text
    is evicted."""
    segment_bytes: int = 32 << 20
    """Size in bytes at which a segment file is closed."""

    @property
    def lock_step(self) -> bool:
        """Whether generation and training take turns."""
        return self.max_policy_age == 0

    def violations(self) -> Iterator[ConfigError]:
        yield from self._use_violations()
        yield from self._size_violations()

    def _use_violations(self) -> Iterator[ConfigError]:
        """How often and until when a group is used."""
        yield from bounded("replay", self, ">= 0", "max_policy_age", remedy="set it to 0 for lock-step")
        yield from bounded(
            "replay", self, "> 0", "samples_per_insert", remedy="set it to 1 to use each group once"
        )
        if self.max_times_sampled < self.samples_per_insert:
            yield ConfigError(
                "replay.max_times_sampled",
                self.max_times_sampled,
                f"be >= replay.samples_per_insert ({self.samples_per_insert})",
                "raise it or lower samples_per_insert, or the learner runs out of groups and waits forever",
            )
        if self.lock_step and self.samples_per_insert != 1:
            yield ConfigError(
                "replay.samples_per_insert",
                self.samples_per_insert,
                "be 1 when replay.max_policy_age=0",
                "raise max_policy_age, because a group that is used again is older than 0 updates",
            )
        yield from bounded("replay", self, ">= 0", "min_size_to_sample")

    def _size_violations(self) -> Iterator[ConfigError]:
        yield from bounded("replay", self, ">= 4096", "segment_bytes", "memory_bytes", "max_bytes")
        if self.segment_bytes > self.memory_bytes:
            yield ConfigError(
                "replay.segment_bytes",
                self.segment_bytes,
                f"be <= replay.memory_bytes ({self.memory_bytes})",
                "lower it or raise memory_bytes",
            )
        if self.memory_bytes > self.max_bytes:
            yield ConfigError(
                "replay.memory_bytes",
                self.memory_bytes,
                f"be <= replay.max_bytes ({self.max_bytes})",
                "lower it or raise max_bytes",
            )


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """Pushes of the learner's weights to the engines."""

    on_push: Literal["recompute", "keep_kv"] = "recompute"
    """What a push does to requests in flight. ``recompute``: their key-value caches are dropped and recomputed
    with the new weights; ``keep_kv``: their caches are kept, and prefix caching is turned off."""
    deadline_s: float = 120.0
    """Number of seconds in which an engine has to load a push. Then it counts as failed, and is started again."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("weights", self, "> 0", "deadline_s")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints from which a run can be resumed."""

    every: int = 10
    """Number of updates between checkpoints. The last update always writes one."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    wait_for_room_s: float = 300.0
    """Number of seconds for which a training waits when the disk has no room for a checkpoint or another file of the run,
    or neither shared memory nor the disk has room for rows or weights. Then it ends with an error and can be resumed.
    0: it ends at once."""

    def violations(self) -> Iterator[ConfigError]:
        yield from bounded("checkpoint", self, ">= 1", "every", "keep")
        yield from bounded("checkpoint", self, ">= 0", "wait_for_room_s")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The processes in which the actors run."""

    backend: Literal["ray", "in_process"] = "ray"
    """``ray``: one process per actor. ``in_process``: one process for all actors, for tiny models and the
    transformers engines."""
    address: str = "auto"
    """Ray cluster that runs the actors. ``local``: a single-node Ray that the run starts for itself. ``HOST:PORT``:
    the cluster with this head. ``auto``: the cluster in the environment variable RAY_ADDRESS, which Ray sets for a
    submitted job, and otherwise ``local``."""
    require_token: bool = True
    """Whether to refuse a cluster that other machines can reach and that needs no token. Ray runs what its clients send,
    so without a token every machine in the network can run commands on the nodes."""
    object_store_bytes: int = 128 << 20
    """Size of a local Ray's object store in bytes. Rows do not pass through it."""
    start_timeout_s: float = 600.0
    """Number of seconds that an actor may take to load its model."""
    stall_timeout_s: float = 1800.0
    """Number of seconds for which an actor may have work without finishing any of it: a response, a scored text or an
    update. Then it counts as failed."""
    beat_timeout_s: float = 60.0
    """Number of seconds within which an actor has to answer a question that costs it nothing. Then it counts as failed."""
    max_restarts: int = 10
    """Number of times that actors which failed are started again within ``cluster.restart_window_s``, all actors of the
    run together. One more failure ends the run. 0: the first failure ends the run."""
    restart_window_s: float = 3600.0
    """Number of seconds in which ``cluster.max_restarts`` are counted."""

    def violations(self) -> Iterator[ConfigError]:
        if self.address not in ("auto", "local"):
            yield from head_address_violations("cluster.address", self.address)
        timeouts = ("start_timeout_s", "stall_timeout_s", "beat_timeout_s", "restart_window_s")
        yield from bounded("cluster", self, "> 0", *timeouts)
        yield from bounded("cluster", self, ">= 0", "max_restarts")
        yield from bounded(
            "cluster",
            self,
            ">= 83886080",
            "object_store_bytes",
            remedy="raise it: Ray accepts no smaller object store (the default is 134217728)",
        )


def head_address_violations(name: str, address: str) -> Iterator[ConfigError]:
    """The errors of an address that is not that of a Ray head. ``name``: where it was written."""
    must = "be auto, local or the HOST:PORT of a Ray head, such as 10.0.0.1:6379"
    if address in NULL:
        yield ConfigError(name, address or "null", must, RETIRED["cluster.address=null"])
    elif "://" in address:
        remedy = "give the head's own address, which `ray start --head` prints; its dashboard (http://HOST:8265) is the --address of `distill submit`"
        yield ConfigError(name, address, must, remedy)
    else:
        host, _, port = address.rpartition(":")
        if not host or not (port.isdecimal() and 0 < int(port) < 1 << 16):
            yield ConfigError(name, address, must, "give the address that `ray start --head` prints")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The trackers that receive a copy of a run's numbers while it trains. They change nothing in the run: one that
    is slow or down loses rows, and ``metrics.parquet`` has them all."""

    to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """List of trackers: ``tensorboard`` (event files in the run folder), ``wandb`` (Weights & Biases), ``mlflow`` and
    ``trackio``. []: none. Addresses and credentials are those of each tracker's own environment variables."""
    project: str = "distill"
    """Project in which Weights & Biases and Trackio show the run; MLflow calls it an experiment."""

    def violations(self) -> Iterator[ConfigError]:
        for name in self.to:
            if name not in TRACKERS:
                must = f"contain only {', '.join(TRACKERS)}"
                yield ConfigError("tracking.to", name, must, did_you_mean(name, TRACKERS))
        if len(set(self.to)) < len(self.to):
            shown = f"[{', '.join(self.to)}]"
            yield ConfigError("tracking.to", shown, "name each tracker once", "remove the repeated name")
        printable = self.project.isprintable() and self.project == self.project.strip()
        if not printable or not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            must = "be 1 to 128 printable characters without / \\ # ? % : and spaces around them"
            yield ConfigError("tracking.project", self.project, must, "choose a plain name, such as distill")
