"""Pools the seeds of a study that ran in several places: on other machines, or here before runs were lost.

All runs of a seed take place on one machine, because a task's models are trained there and differ slightly
between processors. Differences are paired within a seed, so seeds from several machines can be pooled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.study.hashes import stamps
from deploy.study.spec import StudySpec
from distill.config.tree import flatten
from distill.errors import ConfigError

Results = Mapping[str, Any]
_POOLED = ("runs", "diverged", "differences", "teacher")
_KEYS = {"asked", "method_hash", "results_hash", "chosen", "tuning", *_POOLED}


def load_results(path: Path) -> dict[str, Any]:
    """Load a study's ``results.json``, by any version of the code.

    Raises: ConfigError when the file is missing or is something else.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("results", path, f"be a results.json ({error})", "check the path") from None
    keys = results.keys() if isinstance(results, dict) else ()
    if missing := sorted(_KEYS - set(keys)):
        must = f"contain {', '.join(missing)}"
        raise ConfigError("results", path, must, "name a results.json of this version")
    return results


def load_earlier(path: Path, spec: StudySpec) -> dict[str, Any]:
    """Load results of the same study by the same code.

    Raises: ConfigError when the file is missing, or its results are of another study or other code.
    """
    earlier = load_results(path)
    there = flatten({**{name: earlier.get(name, 1) for name in stamps()}, "asked": earlier["asked"]})
    here = flatten({**stamps(), "asked": spec.asked()})
    for name in [*here, *(name for name in there if name not in here)]:
        values = [settings.get(name, "absent") for settings in (there, here)]
        if values[0] != values[1]:
            raise ConfigError(
                f"--with: {name.removeprefix('asked.')}", values[0], f"be {values[1]}",
                "pool results of one study by one version of the code (run missing seeds in a git worktree of it)",
            )  # fmt: skip
    if missing := [recipe for recipe in spec.recipes if recipe not in earlier["chosen"]]:
        raise ConfigError(
            "--with: chosen",
            ", ".join(missing),
            "be tuned in these results",
            "run the whole study there first",
        )
    return earlier


def only_seeds(spec: StudySpec, seeds: Sequence[int]) -> StudySpec:
    """The study with only the given seeds.

    Raises: ConfigError when the study lacks one of them.
    """
    for seed in seeds:
        if seed not in spec.seeds:
            raise ConfigError(
                "--seeds", seed, f"be one of {list(spec.seeds)}", "choose among the study's seeds"
            )
    return replace(spec, seeds=tuple(seed for seed in spec.seeds if seed in seeds))


def without_seeds_of(spec: StudySpec, earlier: Results) -> StudySpec:
    """The study with the seeds that earlier results lack.

    Raises: ConfigError when they lack none.
    """
    done = {run["seed"] for run in earlier["runs"]}
    left = tuple(seed for seed in spec.seeds if seed not in done)
    if not left:
        raise ConfigError("seeds", list(spec.seeds), "include one that --with lacks", "add a seed")
    return replace(spec, seeds=left)


def pooled(earlier: Results, ours: Results) -> dict[str, Any]:
    """Both results as one; they must not share a seed."""
    return (
        {**ours}
        | {name: [*earlier[name], *ours[name]] for name in _POOLED}
        | {name: earlier[name] for name in ("chosen", "tuning")}
    )
