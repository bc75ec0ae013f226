"""A study in parts: seeds that another machine ran, or this one before its runs were lost.

A seed is run whole in one place, since a task's models are trained there and differ a little between
processors; its differences are paired within itself, so seeds of several places can be pooled.
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
    """A study's results.json, of whatever code.

    Raises: ConfigError when it is not there or something else.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("results", path, f"be a results.json ({error})", "check the path") from None
    keys = results.keys() if isinstance(results, dict) else ()
    if missing := sorted(_KEYS - set(keys)):
        must = f"hold {', '.join(missing)} too"
        raise ConfigError("results", path, must, "name a results.json of this version")
    return results


def load_earlier(path: Path, spec: StudySpec) -> dict[str, Any]:
    """Results of the same study by the same code.

    Raises: ConfigError when they are not there or of something else.
    """
    earlier = load_results(path)
    there = flatten({**{name: earlier.get(name, 1) for name in stamps()}, "asked": earlier["asked"]})
    here = flatten({**stamps(), "asked": spec.asked()})
    for name in [*here, *(name for name in there if name not in here)]:
        values = [settings.get(name, "absent") for settings in (there, here)]
        if values[0] != values[1]:
            raise ConfigError(
                f"--with: {name.removeprefix('asked.')}", values[0], f"be {values[1]}",
                     "pool results of one study and one code (a git worktree of that code runs what is missing)"
            )  # fmt: skip
    if missing := [recipe for recipe in spec.recipes if recipe not in earlier["chosen"]]:
        raise ConfigError(
            "--with: chosen", ", ".join(missing), "be tuned there", "run the whole study there first"
        )
    return earlier


def only_seeds(spec: StudySpec, seeds: Sequence[int]) -> StudySpec:
    """Raises: ConfigError when the study has no such seed."""
    for seed in seeds:
        if seed not in spec.seeds:
            raise ConfigError("--seeds", seed, f"be of {list(spec.seeds)}", "choose one of the study's")
    return replace(spec, seeds=tuple(seed for seed in spec.seeds if seed in seeds))


def without_seeds_of(spec: StudySpec, earlier: Results) -> StudySpec:
    """The seeds that are left. Raises: ConfigError when none is."""
    done = {run["seed"] for run in earlier["runs"]}
    left = tuple(seed for seed in spec.seeds if seed not in done)
    if not left:
        raise ConfigError("seeds", list(spec.seeds), "hold one that --with lacks", "add a seed")
    return replace(spec, seeds=left)


def pooled(earlier: Results, ours: Results) -> dict[str, Any]:
    """Both, of seeds that they do not share."""
    return (
        {**ours}
        | {name: [*earlier[name], *ours[name]] for name in _POOLED}
        | {name: earlier[name] for name in ("chosen", "tuning")}
    )
