"""The benchmarks of `distill bench`. Importing this module imports no engine."""

from __future__ import annotations

import importlib

from deploy.benchmarks.harness import Benchmark, Label, Measurement, Say
from distill.errors import ConfigError, did_you_mean

BENCHMARKS: dict[str, Benchmark] = {
    "rollout": Benchmark(
        description="tokens per second of the rollout actor's path against bare vLLM",
        module="deploy.benchmarks.rollout",
        labels={
            "bare": Label(
                meaning="tokens/s of generate, rows and store / AsyncLLM with the same requests", goal=0.95
            ),
            "plain": Label(meaning="tokens/s of the same / AsyncLLM without seeds and log-probabilities"),
        },
    ),
    "teacher": Benchmark(
        description="tokens per second of teacher scoring against the bare pooling engine",
        module="deploy.benchmarks.teacher",
        labels={
            "bare": Label(
                meaning="tokens/s of scoring, payload and store / LLMEngine with the same texts", goal=0.95
            )
        },
    ),
    "push": Benchmark(
        description="seconds of a weight push against the least that one can take",
        module="deploy.benchmarks.push",
        labels={
            "floor": Label(
                meaning="seconds of a push / seconds of a memory copy and vLLM's own load_weights",
                goal=1.3,
                at_least=False,
            )
        },
    ),
    "pipeline": Benchmark(
        description="a run of engines that wait, against its slowest stage and against lock-step",
        module="deploy.benchmarks.pipeline",
        num_pairs=3,
        labels={
            "slowest": Label(meaning="trajectories/s of a run / of its slowest stage alone", goal=0.95),
            "lockstep": Label(meaning="trajectories/s of the same run / in lock-step", goal=2.7),
        },
    ),
    "scale": Benchmark(
        description="what the control plane costs per trajectory, from 1 to 256 engines",
        module="deploy.benchmarks.scale",
        num_pairs=3,
        labels={
            "growth": Label(meaning="the largest cost / the smallest", goal=1.25, at_least=False),
            "ms": Label(meaning="the largest cost in CPU ms / 1 ms", goal=1.0, at_least=False),
        },
    ),
    "replay": Benchmark(
        description="insert, lease and map scored trajectories across processes against copies and peers",
        module="deploy.benchmarks.replay",
        num_pairs=3,
        labels={
            "memcpy": Label(
                meaning="trajectories/s through segment store and replay / a memory copy and a map", goal=0.5
            ),
            "transferqueue": Label(
                meaning="trajectories/s of the same / TransferQueue with SimpleStorage", goal=1.0
            ),
            "transferqueue_own": Label(
                meaning="bytes/s of the same / TransferQueue with the data of its own performance test"
            ),
            "torchrl": Label(
                meaning="trajectories/s of the same / TorchRL with a shared LazyMemmapStorage", goal=1.0
            ),
            "pickle": Label(
                meaning="trajectories/s of the same / lists of rows in Ray's object store", goal=1.0
            ),
        },
    ),
    "peer": Benchmark(
        description="completion tokens per second of a whole run against TRL's DistillationTrainer",
        module="deploy.benchmarks.peer",
        num_pairs=3,
        labels={
            "trl_rkl": Label(
                meaning="tokens/s of reverse KL on student text / TRL with the same loss", goal=2.4
            ),
            "trl_ammd": Label(meaning="tokens/s of ammd / TRL with reverse KL", goal=1.3),
        },
    ),
}


def find_benchmark(name: str) -> Benchmark:
    """Raises: ConfigError for an unknown name."""
    if name not in BENCHMARKS:
        raise ConfigError(
            "benchmark", name, f"be one of {', '.join(BENCHMARKS)}", did_you_mean(name, BENCHMARKS)
        )
    return BENCHMARKS[name]


def run_benchmark(name: str, num_pairs: int | None, say: Say) -> Measurement:
    """Measure. ``num_pairs``: None for the benchmark's own number.

    Raises: ConfigError for an unknown name; BenchmarkFailed.
    """
    benchmark = find_benchmark(name)
    return importlib.import_module(benchmark.module).measure(num_pairs or benchmark.num_pairs, say)
