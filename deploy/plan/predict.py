"""The predicted speed of a configuration, and of the ways to divide a number of devices among its pools."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.plan.load import Load, Outcome
from deploy.plan.measured import Measured
from deploy.plan.simulate import simulate
from deploy.run.training.advice import Advice, Setup, advise
from distill.config import RunConfig
from distill.config.tree import with_settings

SIMULATED_UPDATES = 24
MOST_SAMPLES = 8192
"""Samples of one simulation. Of large updates, fewer are simulated."""
FEWEST_UPDATES = 8
SIMULATED_SPLITS = 3
"""How many of the splits of a number of devices are simulated: those that look best by their stages' rates alone."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a configuration will do."""

    config: RunConfig
    updates_per_s: float
    tokens_per_s: float
    """Of the student's text."""
    row: Mapping[str, float]
    """Busy shares by the names of ``metrics.parquet``."""
    advice: Advice | None

    def to_dict(self) -> dict[str, Any]:
        """For ``distill plan --json``."""
        return {
            "rollout.replicas": self.config.rollout.replicas,
            "scoring.replicas": self.config.scoring.replicas,
            "updates_per_s": self.updates_per_s,
            "tokens_per_s": self.tokens_per_s,
            "busy_shares": {
                name.partition("/")[0]: share
                for name, share in self.row.items()
                if name.endswith("/busy_share")
            },
            "limit": self.advice.stage if self.advice is not None else None,
            "advice": self.advice.to_dict() if self.advice is not None else None,
        }


@dataclass(frozen=True, kw_only=True)
class Split:
    """Devices divided among the rollout engines, the scoring engines and the learner, which has one."""

    num_devices: int
    prediction: Prediction


def predict(measured: Measured, config: RunConfig, setup: Setup) -> Prediction:
    """Simulate a run of ``config``. ``setup``: its threads, and the cores that its actors share if they do.

    Raises: ConfigError when the configuration has other models or texts than the run that was measured.
    """
    load = measured.load(config, setup.num_threads)
    outcome = simulate(load.changed({"learner.num_updates": _num_updates(config)}))
    return _prediction(measured, load, outcome, setup)


def _prediction(measured: Measured, load: Load, outcome: Outcome, setup: Setup) -> Prediction:
    speed = min(1.0, setup.speed_within_cores(outcome.row))
    row = {name: value * (speed if name.endswith("share") else 1.0) for name, value in outcome.row.items()}
    return Prediction(
        config=load.config,
        updates_per_s=speed * outcome.updates_per_s,
        tokens_per_s=speed * outcome.samples_per_s * measured.tokens_per_sample,
        row=row,
        advice=advise(row, setup),
    )


def _num_updates(config: RunConfig) -> int:
    samples = config.learner.prompts_per_update * config.rollout.samples_per_prompt
    samples += config.learner.teacher_rows_per_update
    return max(FEWEST_UPDATES, min(SIMULATED_UPDATES, MOST_SAMPLES // samples))


def best_splits(measured: Measured, config: RunConfig, sizes: Sequence[int]) -> Iterator[Split]:
    """The fastest split of each number of devices. Each actor has devices of its own, as fast as the measured ones."""
    setup = Setup(
        max_policy_age=config.replay.max_policy_age, uses_student_text=config.recipe.uses_student_text
    )
    for num_devices in sizes:
        candidates = [measured.load(each, {}) for each in _splits(config, num_devices)]
        best = heapq.nlargest(SIMULATED_SPLITS, candidates, key=_speed_of_stages)
        predictions = [predict(measured, load.config, setup) for load in best]
        if predictions:
            yield Split(
                num_devices=num_devices, prediction=max(predictions, key=lambda each: each.updates_per_s)
            )


def fewest_devices(config: RunConfig) -> int:
    """One engine of each kind, and the learner."""
    return config.rollout.tensor_parallel_size + config.scoring.tensor_parallel_size + _fixed_devices(config)


def _fixed_devices(config: RunConfig) -> int:
    """Of the learner, and of the one teacher that evaluations have beside the scorers of a proxy."""
    return 1 + (config.scoring.tensor_parallel_size if config.recipe.teacher_gives == "text" else 0)


def _splits(config: RunConfig, num_devices: int) -> Iterator[RunConfig]:
    rollout, teacher = config.rollout.tensor_parallel_size, config.scoring.tensor_parallel_size
    engines = num_devices - _fixed_devices(config)
    # Without student text, one engine samples for the evaluations.
    most = engines // rollout if config.recipe.uses_student_text else 1
    for rollouts in range(1, most + 1):
        teachers = (engines - rollout * rollouts) // teacher
        if teachers >= 1:
            yield with_settings(config, {"rollout.replicas": rollouts, "scoring.replicas": teachers})


def _speed_of_stages(load: Load) -> float:
    """Updates per second of stages that overlap or take turns, without the waits between them."""
    rates = load.rates.values()
    if not load.config.replay.lock_step:
        return min(rates)
    return 1 / sum(1 / rate for rate in rates)


def curve_sizes(fewest: int, most: int) -> list[int]:
    """Numbers of devices from the fewest to the most: all of a few, and otherwise each half as large again."""
    if most - fewest < 8:
        return list(range(fewest, most + 1))
    sizes = [fewest]
    while sizes[-1] < most:
        sizes.append(min(most, sizes[-1] + max(1, sizes[-1] // 2)))
    return sizes
