"""`distill bench`: runs a benchmark, writes its file, and compares it with its goals and with a stored result."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from deploy.benchmarks.registry import BENCHMARKS, find_benchmark, run_benchmark
from deploy.benchmarks.result import compare, document, missed, read_baseline, table
from deploy.exits import DONE, complain
from distill.errors import DistillError
from distill.files import write_json


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What the user wants to know."""

    name: str
    num_pairs: int | None
    json: Path | None
    baseline: Path | None
    tolerated_fall: float


def list_benchmarks() -> int:
    """Print one line per benchmark; returns the exit code."""
    width = max(map(len, BENCHMARKS))
    for name, benchmark in BENCHMARKS.items():
        print(f"{name:{width}}  {benchmark.description}")
    return DONE


def bench(request: BenchRequest) -> int:
    """Run a benchmark; returns the exit code, 1 if it missed a goal or became slower than the stored result.

    Raises: ConfigError before anything is measured; BenchmarkFailed.
    """
    benchmark = find_benchmark(request.name)
    baseline = read_baseline(request.baseline, request.name) if request.baseline else None
    found = document(request.name, benchmark, run_benchmark(request.name, request.num_pairs, _say))
    if request.json:
        write_json(request.json, found)
    print(table(benchmark, found))
    failures: list[DistillError] = []
    if baseline is not None:
        failures += compare(benchmark, found, baseline, request.tolerated_fall)
    for failure in failures:
        complain(str(failure))
    return DistillError.exit_code if failures or missed(benchmark, found) else DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
