"""The result of a benchmark: the file that is kept, its verdict, and its comparison with a stored result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deploy.benchmarks.facts import commit, machine, versions
from deploy.benchmarks.harness import Benchmark, BenchmarkFailed, Measurement, Ratio
from distill.errors import ConfigError
from distill.files import plain

_DIGITS = 6


class Regression(BenchmarkFailed):
    """A median that is worse than the stored one."""

    code = "regression"


def document(name: str, benchmark: Benchmark, measurement: Measurement) -> dict[str, Any]:
    """The content of the file.

    Raises: BenchmarkFailed when the measured labels are not those of the benchmark.
    """
    if set(measurement.pairs) != set(benchmark.labels):
        raise BenchmarkFailed(
            f"labels that {name} measured", ", ".join(measurement.pairs), f"be {', '.join(benchmark.labels)}"
        )
    ratios = {label: Ratio.of(pairs) for label, pairs in measurement.pairs.items()}
    return plain(
        {
            "name": name,
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "ratios": {label: _rounded(asdict(ratio)) for label, ratio in ratios.items()},
            "goals": benchmark.goals,
            "raw": {label: _rounded(pairs) for label, pairs in measurement.pairs.items()},
            "notes": _rounded(measurement.notes),
            "machine": machine(),
            "versions": {**versions(), **measurement.versions},
        }
    )


def missed(benchmark: Benchmark, found: Mapping[str, Any]) -> list[str]:
    """The labels whose median misses its goal."""
    return [
        label for label, rule in benchmark.labels.items() if not rule.is_met(found["ratios"][label]["median"])
    ]


def table(benchmark: Benchmark, found: Mapping[str, Any]) -> str:
    """The ratios as lines for a terminal."""
    failing = missed(benchmark, found)
    lines = []
    for label, rule in benchmark.labels.items():
        ratio = found["ratios"][label]
        verdict = "" if rule.goal is None else (", missed" if label in failing else ", met")
        lines.append(
            f"{label}: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}); "
            f"goal: {rule.bound}{verdict}; {rule.meaning}"
        )
    return "\n".join(lines)


def read_baseline(path: Path, name: str) -> dict[str, Any]:
    """Read the stored result of benchmark ``name``.

    Raises: ConfigError when the file is missing, is something else, or belongs to another benchmark.
    """
    remedy = "give a file that `distill bench NAME --json FILE` wrote"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("--baseline", path, "exist", remedy) from None
    except (OSError, ValueError) as error:
        raise ConfigError("--baseline", path, f"be a readable JSON file ({error})", remedy) from None
    if not isinstance(found, dict) or not {"name", "ratios"} <= found.keys():
        raise ConfigError("--baseline", path, "contain name and ratios", remedy)
    if found["name"] != name:
        must = f"be a result of {name}, not of {found['name']}"
        raise ConfigError("--baseline", path, must, "give the file of the same benchmark")
    return found


def compare(
    benchmark: Benchmark, found: Mapping[str, Any], baseline: Mapping[str, Any], tolerated_fall: float
) -> list[Regression]:
    """The labels whose median is worse than the stored one by more than ``tolerated_fall``, a share of it.

    A label that only one of the two has is not compared, because benchmarks gain and lose labels.
    """
    worse = []
    for label, rule in benchmark.labels.items():
        if label not in baseline["ratios"]:
            continue
        before, now = baseline["ratios"][label]["median"], found["ratios"][label]["median"]
        share = 1 - tolerated_fall if rule.at_least else 1 + tolerated_fall
        bound = before * share
        if now < bound if rule.at_least else now > bound:
            direction = "least" if rule.at_least else "most"
            worse.append(
                Regression(
                    f"median of {found['name']}, {label}",
                    f"{now:.3f}",
                    f"be at {direction} {bound:.3f}, because the stored median is {before:.3f} and may become worse "
                    f"by {tolerated_fall:.0%}",
                    "repeat it on a quiet machine, then find the change that made it slower",
                )
            )
    return worse


def _rounded(value: Any) -> Any:
    """``value`` with six significant digits per number, which is more than any timing has."""
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
