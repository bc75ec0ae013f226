"""What a study compares, read from a YAML file.

name: tiny
task: tiny-wiki                  # models and prompts, see deploy/study/tasks/registry.py
seeds: [0, 1, 2]
baseline: kd                     # differences are taken from it
metrics: [teacher_text.tv, student_text.tv]
settings: {learner: {num_updates: 1500}}      # of every run, on top of the task's
recipes:
  kd: {}
  triangular: {recipe.anchor_weight: 0.1}     # a preset with fields on top
  both: {recipe: jsd, recipe.student_text: every_update}
  longer: {recipe: kd, tuned_as: kd, learner.num_updates: 6000}   # takes what kd's tuning chose
comparisons: [[both, triangular]]   # further pairs, beside those with the baseline
texts: true                      # also measure what the students write (measure_run.py)
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
    """The same grid for every recipe, on prompts and seeds that are not reported."""

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
    """Pairs of recipes beside those with the baseline."""
    texts: bool = False
    """Whether what the students write is measured too, at several temperatures (measure_run.py)."""

    def asked(self) -> dict[str, Any]:
        """All but the seeds, as JSON has it: results of equal ones can be pooled."""
        return json.loads(json.dumps({**asdict(self), "seeds": None}))


_KEYS = (
    "name", "task", "recipes", "seeds", "baseline", "metrics", "settings", "comparisons", "tuning", "texts",
)  # fmt: skip
_METRICS = (*METRICS, *EXTRA_METRICS)
_TUNING_KEYS = ("grid", "seeds", "settings", "metric")


def load_study(path: str | Path) -> StudySpec:
    """Raises: ConfigError naming the key, the rule and the remedy."""
    tree = read_yaml(path, "study", "hold a mapping", "see docs/studies.md")
    _known(tree, _KEYS, "")
    for key in ("name", "task", "recipes", "seeds"):
        if not tree.get(key):
            raise ConfigError(key, _shown(tree.get(key)), "be given", "see docs/studies.md")
    if not _PLAIN_NAME.fullmatch(str(tree["name"])):
        raise ConfigError("name", tree["name"], "be letters, digits, - and _", "it names a folder")
    _typed(tree, "recipes", dict, "be a mapping from names to settings")
    _typed(tree, "settings", dict, "be a mapping of settings")
    _typed(tree, "tuning", dict, f"be a mapping of {', '.join(_TUNING_KEYS)}")
    _typed(tree, "texts", bool, "be true or false")
    for key in ("seeds", "metrics", "comparisons"):
        _typed(tree, key, list, "be a list")
    for name, settings in tree["recipes"].items():
        if not (isinstance(name, str) and _RECIPE_NAME.fullmatch(name)):
            raise ConfigError(
                "recipes", _shown(name), "be named by letters, digits, -, _ and .", "it names folders"
            )
        _typed({f"recipes.{name}": settings}, f"recipes.{name}", dict, "be a mapping of settings")
    recipes = {name: flatten(settings or {}) for name, settings in tree["recipes"].items()}
    for name, settings in recipes.items():
        _not_ours(settings, f"recipes.{name}.")
        if "tuned_as" not in settings:
            continue
        other = settings["tuned_as"]
        if (
            not isinstance(other, str)
            or other == name
            or other not in recipes
            or "tuned_as" in recipes[other]
        ):
            must = "be another recipe, that is tuned itself"
            raise ConfigError(f"recipes.{name}.tuned_as", _shown(other), must, "name one of this study")
    baseline = tree.get("baseline", next(iter(recipes)))
    if not isinstance(baseline, str) or baseline not in recipes:
        raise ConfigError("baseline", baseline, f"be one of {', '.join(recipes)}", "choose one of them")
    metrics = tuple(tree.get("metrics") or EVALUATION_METRICS)
    tuning = _tuning(tree["tuning"]) if tree.get("tuning") else None
    asked = [("metrics", metric) for metric in metrics]
    if tuning:
        asked.append(("tuning.metric", tuning.metric))
    for key, metric in asked:
        if metric not in _METRICS:
            raise ConfigError(key, metric, f"be of {', '.join(_METRICS)}", "choose among them")
    if tuning and direction(tuning.metric) == 0:
        raise ConfigError(
            "tuning.metric", tuning.metric, "have a better and a worse", "choose a distance or a score"
        )
    seeds = _seeds("seeds", tree["seeds"])
    if tuning and set(tuning.seeds) & set(seeds):
        raise ConfigError(
            "tuning.seeds", list(tuning.seeds), "share none with seeds", "reported seeds are not tuned on"
        )
    settings = flatten(tree.get("settings") or {})
    _not_ours(settings, "settings.")
    return StudySpec(
        name=str(tree["name"]),
        task=str(tree["task"]),
        recipes=recipes,
        seeds=seeds,
        baseline=baseline,
        metrics=metrics,
        settings=settings,
        comparisons=tuple(_pair(pair, recipes) for pair in tree.get("comparisons") or ()),
        tuning=tuning,
        texts=bool(tree.get("texts", False)),
    )


def _tuning(tree: dict[str, Any]) -> Tuning:
    _known(tree, _TUNING_KEYS, "tuning.")
    _typed(tree, "grid", dict, "be a mapping from settings to lists of values", "tuning.")
    _typed(tree, "settings", dict, "be a mapping of settings", "tuning.")
    _typed(tree, "seeds", list, "be a list", "tuning.")
    for name, values in (tree.get("grid") or {}).items():
        _typed({name: values}, name, list, "be a list of values to try", "tuning.grid.")
        if not values:
            raise ConfigError(f"tuning.grid.{name}", _shown(values), "hold a value", "or leave it out")
        for value in values:
            if values.count(value) > 1:
                raise ConfigError(f"tuning.grid.{name}", _shown(values), "hold each value once",
                                       "leave the repeated one out")  # fmt: skip
    grid = {name: list(values) for name, values in (tree.get("grid") or {}).items()}
    settings = flatten(tree.get("settings") or {})
    _not_ours(grid, "tuning.grid.")
    _not_ours(settings, "tuning.settings.")
    return Tuning(
        grid=grid,
        seeds=_seeds("tuning.seeds", tree.get("seeds", [100])),
        settings=settings,
        metric=str(tree.get("metric", "teacher_text.tv")),
    )


def _pair(pair: Any, recipes: Mapping[str, Settings]) -> tuple[str, str]:
    good = isinstance(pair, list) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
    if not (good and set(pair) <= set(recipes) and pair[0] != pair[1]):
        raise ConfigError(
            "comparisons", pair, f"be pairs of {', '.join(recipes)}", "write [[one, other], ...]"
        )
    return pair[0], pair[1]


def _seeds(key: str, seeds: Any) -> tuple[int, ...]:
    """Raises: ConfigError unless they are whole numbers >= 0, each once."""
    numbers = [seed for seed in seeds or () if type(seed) is int and seed >= 0]
    if not numbers or len(set(numbers)) != len(seeds):
        raise ConfigError(key, _shown(seeds), "be whole numbers >= 0, each once", "write [0, 1, 2]")
    return tuple(numbers)


_PLAIN_NAME = re.compile(r"[\w-]+")
_RECIPE_NAME = re.compile(r"\w[\w.-]*")


def _known(tree: Mapping[str, Any], keys: Sequence[str], prefix: str) -> None:
    for key in tree:
        if key not in keys:
            remedy = did_you_mean(str(key), keys, f"there are {', '.join(keys)}", prefix=prefix)
            raise ConfigError(f"{prefix}{key}", NO_VALUE, "be a key of a study", remedy)


def _not_ours(settings: Mapping[str, Any], prefix: str) -> None:
    """Raises: ConfigError for a setting that the study gives each run itself."""
    for name, remedy in {
        "seed": "list it under seeds",
        "run_dir": "name the study's folder by --out",
    }.items():
        if name in settings:
            raise ConfigError(f"{prefix}{name}", _shown(settings[name]), "be left out", remedy)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _typed(tree: Mapping[str, Any], key: str, kind: type, must: str, prefix: str = "") -> None:
    """An absent or null entry is no mistake here."""
    value = tree.get(key)
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{prefix}{key}", value, must, "see docs/studies.md")
