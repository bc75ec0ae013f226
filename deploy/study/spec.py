"""What a study compares, read from a YAML file.

name: tiny
task: tiny-wiki                  # models and prompts, see deploy/study/tasks/registry.py
seeds: [0, 1, 2]
baseline: kd                     # the recipe that the others are compared with
metrics: [teacher_text.tv, student_text.tv]
settings: {learner: {num_updates: 1500}}      # for every run, on top of the task's
recipes:
  kd: {}
  triangular: {recipe.anchor_weight: 0.1}     # a preset with settings on top
  both: {recipe: jsd, recipe.student_text: every_update}
  longer: {recipe: kd, tuned_as: kd, learner.num_updates: 6000}   # uses the values chosen for kd
comparisons: [[both, triangular]]   # pairs in addition to those with the baseline
texts: true                      # also measure the students' own texts (measure_run.py)
tuning:
  grid: {learner.learning_rate: [1.e-3, 3.e-3]}
  seeds: [100]
  settings: {learner: {num_updates: 300}}
  metric: teacher_text.tv
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.config import EVALUATION_METRICS
from distill.config.load import read_yaml
from distill.config.tree import flatten
from distill.errors import NO_VALUE, ConfigError, did_you_mean
from distill.evaluation import EXTRA_METRICS, METRICS, direction

Settings = dict[str, Any]
"""Dotted setting -> value."""


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen: one grid for every recipe, on prompts and seeds that are not reported."""

    grid: Mapping[str, Sequence[Any]]
    seeds: tuple[int, ...]
    settings: Settings
    metric: str

    def points(self) -> Iterator[Settings]:
        """Every combination of the grid; one empty point without a grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


@dataclass(frozen=True)
class StudySpec:
    """Recipes on one task, with several seeds."""

    name: str
    task: str
    recipes: Mapping[str, Settings]
    seeds: tuple[int, ...]
    baseline: str
    metrics: tuple[str, ...]
    settings: Settings = field(default_factory=dict)
    tuning: Tuning | None = None
    comparisons: tuple[tuple[str, str], ...] = ()
    """Pairs of recipes to compare in addition to those with the baseline."""
    texts: bool = False
    """Whether the students' own texts are measured too, at several temperatures (measure_run.py)."""

    def asked(self) -> dict[str, Any]:
        """Everything but the seeds, as JSON. Results of studies that ask for the same can be pooled."""
        return json.loads(json.dumps({**asdict(self), "seeds": None}))


_KEYS = (
    "name", "task", "recipes", "seeds", "baseline", "metrics", "settings", "comparisons", "tuning", "texts",
)  # fmt: skip
_METRICS = (*METRICS, *EXTRA_METRICS)
_TUNING_KEYS = ("grid", "seeds", "settings", "metric")


def load_study(path: str | Path) -> StudySpec:
    """Read a study file.

    Raises: ConfigError naming the key, the rule and the remedy.
    """
    tree = read_yaml(path, "study", "contain a mapping", "see docs/studies.md")
    _require_shape(tree)
    recipes = _recipes(tree["recipes"])
    seeds = _seeds("seeds", tree["seeds"])
    tuning = _tuning(tree["tuning"], seeds) if tree.get("tuning") else None
    settings = flatten(tree.get("settings") or {})
    _require_free(settings, "settings.")
    return StudySpec(
        name=str(tree["name"]),
        task=str(tree["task"]),
        recipes=recipes,
        seeds=seeds,
        baseline=_baseline(tree.get("baseline", next(iter(recipes))), recipes),
        metrics=tuple(_metric("metrics", name) for name in tree.get("metrics") or EVALUATION_METRICS),
        settings=settings,
        comparisons=tuple(_pair(pair, recipes) for pair in tree.get("comparisons") or ()),
        tuning=tuning,
        texts=bool(tree.get("texts", False)),
    )


def _require_shape(tree: Mapping[str, Any]) -> None:
    """Raises: ConfigError for an unknown or missing key, or a value of the wrong type."""
    _require_known(tree, _KEYS, "")
    for key in ("name", "task", "recipes", "seeds"):
        if not tree.get(key):
            raise ConfigError(key, _as_json(tree.get(key)), "be given", "see docs/studies.md")
    if not _PLAIN_NAME.fullmatch(str(tree["name"])):
        raise ConfigError("name", tree["name"], "be letters, digits, - and _", "it names a folder")
    _require_type(tree, "recipes", dict, "be a mapping from names to settings")
    _require_type(tree, "settings", dict, "be a mapping of settings")
    _require_type(tree, "tuning", dict, f"be a mapping of {', '.join(_TUNING_KEYS)}")
    _require_type(tree, "texts", bool, "be true or false")
    for key in ("seeds", "metrics", "comparisons"):
        _require_type(tree, key, list, "be a list")


def _recipes(tree: Mapping[Any, Any]) -> dict[str, Settings]:
    for name, settings in tree.items():
        if not (isinstance(name, str) and _RECIPE_NAME.fullmatch(name)):
            raise ConfigError(
                "recipes", _as_json(name), "be named by letters, digits, -, _ and .", "it names folders"
            )
        _require_type({f"recipes.{name}": settings}, f"recipes.{name}", dict, "be a mapping of settings")
    recipes = {name: flatten(settings or {}) for name, settings in tree.items()}
    for name, settings in recipes.items():
        _require_free(settings, f"recipes.{name}.")
        other = settings.get("tuned_as")
        if "tuned_as" in settings and not (
            isinstance(other, str) and other != name and other in recipes and "tuned_as" not in recipes[other]
        ):
            must = "be another recipe, one that is itself tuned"
            raise ConfigError(f"recipes.{name}.tuned_as", _as_json(other), must, "name one of this study")
    return recipes


def _baseline(name: Any, recipes: Mapping[str, Settings]) -> str:
    if not isinstance(name, str) or name not in recipes:
        raise ConfigError("baseline", name, f"be one of {', '.join(recipes)}", "choose one of them")
    return name


def _metric(key: str, name: Any) -> str:
    if name not in _METRICS:
        raise ConfigError(key, name, f"be one of {', '.join(_METRICS)}", "choose one of them")
    return name


def _tuning(tree: dict[str, Any], reported_seeds: Sequence[int]) -> Tuning:
    _require_known(tree, _TUNING_KEYS, "tuning.")
    _require_type(tree, "settings", dict, "be a mapping of settings", "tuning.")
    _require_type(tree, "seeds", list, "be a list", "tuning.")
    settings = flatten(tree.get("settings") or {})
    _require_free(settings, "tuning.settings.")
    seeds = _seeds("tuning.seeds", tree.get("seeds", [100]))
    if set(seeds) & set(reported_seeds):
        raise ConfigError(
            "tuning.seeds", list(seeds), "have no seed in common with seeds", "tune on seeds that are not reported"
        )  # fmt: skip
    metric = _metric("tuning.metric", str(tree.get("metric", "teacher_text.tv")))
    if direction(metric) == 0:
        raise ConfigError("tuning.metric", metric, "have a better direction", "choose a distance or a score")
    return Tuning(grid=_grid(tree), seeds=seeds, settings=settings, metric=metric)


def _grid(tree: Mapping[str, Any]) -> dict[str, list[Any]]:
    _require_type(tree, "grid", dict, "be a mapping from settings to lists of values", "tuning.")
    grid = tree.get("grid") or {}
    for name, values in grid.items():
        _require_type({name: values}, name, list, "be a list of values to try", "tuning.grid.")
        if not values:
            raise ConfigError(
                f"tuning.grid.{name}", _as_json(values), "contain a value", "add one, or leave the setting out"
            )  # fmt: skip
        if any(values.count(value) > 1 for value in values):
            raise ConfigError(
                f"tuning.grid.{name}", _as_json(values), "contain each value once", "remove the duplicate"
            )
    _require_free(grid, "tuning.grid.")
    return {name: list(values) for name, values in grid.items()}


def _pair(pair: Any, recipes: Mapping[str, Settings]) -> tuple[str, str]:
    good = isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
    if not (good and set(pair) <= set(recipes) and pair[0] != pair[1]):
        raise ConfigError(
            "comparisons", pair, f"be pairs of {', '.join(recipes)}", "write [[one, other], ...]"
        )
    return pair[0], pair[1]


def _seeds(key: str, seeds: Any) -> tuple[int, ...]:
    """Raises: ConfigError unless the seeds are distinct whole numbers >= 0."""
    numbers = [seed for seed in seeds or () if type(seed) is int and seed >= 0]
    if not numbers or len(set(numbers)) != len(seeds):
        raise ConfigError(key, _as_json(seeds), "be distinct whole numbers >= 0", "write [0, 1, 2]")
    return tuple(numbers)


_PLAIN_NAME = re.compile(r"[\w-]+")
_RECIPE_NAME = re.compile(r"\w[\w.-]*")


def _require_known(tree: Mapping[str, Any], keys: Sequence[str], prefix: str) -> None:
    for key in tree:
        if key not in keys:
            remedy = did_you_mean(str(key), keys, f"there are {', '.join(keys)}", prefix=prefix)
            raise ConfigError(f"{prefix}{key}", NO_VALUE, "be a key of a study", remedy)


def _require_free(settings: Mapping[str, Any], prefix: str) -> None:
    """Raises: ConfigError for a setting that the study itself sets for every run."""
    for name, remedy in {
        "seed": "list it under seeds",
        "run_dir": "name the study's folder with --out",
    }.items():
        if name in settings:
            raise ConfigError(f"{prefix}{name}", _as_json(settings[name]), "be left out", remedy)


def _as_json(value: Any) -> str:
    return json.dumps(value, default=str)


def _require_type(tree: Mapping[str, Any], key: str, kind: type, must: str, prefix: str = "") -> None:
    """Raises: ConfigError for a value of another type; an absent or null entry passes."""
    value = tree.get(key)
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{prefix}{key}", value, must, "see docs/studies.md")
