"""What a run has measured, and what is predicted from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import PRESETS
from deploy.plan.command import _lacking
from deploy.plan.measured import Measured, measured
from deploy.plan.predict import best_splits, curve_sizes, fewest_devices, predict
from deploy.plan.probe import probe_config
from deploy.recipes import read_recipes
from deploy.report.run_files import RunFiles
from deploy.run.training.advice import Setup
from distill.config import LearnerConfig, RecipeConfig, ReplayConfig, RolloutConfig, RunConfig, ScoringConfig
from distill.config.load import load_config
from distill.config.tree import with_settings
from distill.errors import ConfigError
from distill.run.folder import RunFolder

CONFIG = RunConfig(
    recipe=RecipeConfig(teacher_text="none"),
    learner=LearnerConfig(num_updates=12, prompts_per_update=8),
    replay=ReplayConfig(max_policy_age=0),
    rollout=RolloutConfig(samples_per_prompt=1),
    scoring=ScoringConfig(),
)
EVERY = dict.fromkeys(("rollout", "teacher", "learner"), 2)
SETUP = Setup(max_policy_age=0, num_cores=2, num_threads=EVERY)


def run_of(config: RunConfig = CONFIG, **columns: Any) -> RunFiles:
    """A run in lock-step: 0.5 s of a sample, 0.25 s of a text, 0.25 s of a row, 0.3 s of a push, 0.2 s between."""
    updates = np.arange(1.0, 13.0)
    evaluations = np.where(updates >= 7, 32.0, 0.0)  # one after update 6
    samples = texts = 8 * updates + evaluations
    metrics = {
        "update": updates,
        "rollout/num_samples": samples,
        "rollout/num_tokens": 20 * samples,
        "teacher/num_texts": texts,
        "timing/rollout_busy_s": 0.5 * samples,
        "timing/teacher_busy_s": 0.25 * texts,
        "timing/learner_busy_s": np.full(12, 2.0),
        "timing/push_s": np.full(12, 0.3),
        "timing/update_s": np.full(12, 4.0 + 2.0 + 2.0 + 0.3 + 0.2),
    }
    return RunFiles(
        RunFolder(Path("/runs/a")),
        metrics=metrics | columns,
        events=[
            {"event": "training_started", "setup": vars(SETUP)},
            {"event": "evaluated", "label": "step-6"},
        ],
    )


def found(config: RunConfig = CONFIG) -> Measured:
    return measured(run_of(), config)


def test_a_run_tells_what_each_piece_of_work_takes():
    run = found()
    assert (run.sample_s, run.text_s, run.row_s) == pytest.approx((0.5, 0.25, 0.25))
    assert (run.push_s, run.between_s, run.tokens_per_sample) == pytest.approx((0.3, 0.2, 20.0))
    assert run.num_updates == 9  # neither the first two nor the one after the evaluation


def test_the_same_run_is_predicted_from_its_parts():
    prediction = predict(found(), CONFIG, SETUP)
    assert 1 / prediction.updates_per_s == pytest.approx(8.5, rel=0.01)
    assert prediction.tokens_per_s == pytest.approx(8 * 20 / 8.5, rel=0.01)
    assert prediction.advice is not None and "cores are in use" in prediction.advice.text


def test_engines_with_half_the_threads_take_twice_as_long():
    two = with_settings(CONFIG, {"rollout.replicas": 2})
    halves = Setup(max_policy_age=0, num_cores=2, num_threads={**EVERY, "rollout": 1})
    assert 1 / predict(found(), two, halves).updates_per_s == pytest.approx(8.5, rel=0.01)


def test_overlap_does_not_make_cores_faster():
    overlapping = with_settings(CONFIG, {"replay.max_policy_age": 3})
    prediction = predict(found(), overlapping, replace(SETUP, max_policy_age=3))
    # 4 s of rollouts, 2 s of scoring and 2 s of the learner keep both cores busy.
    assert 1 / prediction.updates_per_s == pytest.approx(8.0, rel=0.05)
    apart = predict(found(), overlapping, Setup(max_policy_age=3))
    assert 1 / apart.updates_per_s == pytest.approx(4.0, rel=0.1)


def test_devices_go_where_they_make_the_run_fastest():
    config = with_settings(CONFIG, {"replay.max_policy_age": 3})
    assert fewest_devices(config) == 3
    splits = list(best_splits(found(), config, [3, 5, 9]))
    assert [each.num_devices for each in splits] == [3, 5, 9]
    assert all(each.prediction.config.rollout.replicas >= 2 for each in splits[1:])
    speeds = [each.prediction.updates_per_s for each in splits]
    # 4 s of the rollouts in the first, and 2 s of the learner at last.
    assert speeds == pytest.approx([1 / 4, 1 / 2, 1 / 2], rel=0.1)


def test_sizes_of_a_curve():
    assert curve_sizes(3, 6) == [3, 4, 5, 6]
    assert curve_sizes(3, 64) == [3, 4, 6, 9, 13, 19, 28, 42, 63, 64]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: run_of(update=np.arange(1.0, 3.0)), "more updates"),
        (lambda: run_of(**{"teacher/num_texts": None}), "teacher/num_texts"),
    ],
    ids=["short", "old"],
)
def test_a_run_that_has_not_measured_enough_is_refused(run: Any, said: str):
    torn = run()
    torn.metrics = {name: values for name, values in torn.metrics.items() if values is not None}
    if said == "more updates":
        torn.metrics = {name: values[:2] for name, values in torn.metrics.items()}
    with pytest.raises(ConfigError, match=said):
        measured(torn, CONFIG)


def test_a_resumed_run_whose_counters_begin_again_tells_the_same():
    run = run_of()
    for name in ("rollout/num_samples", "rollout/num_tokens", "teacher/num_texts",
                 "timing/rollout_busy_s", "timing/teacher_busy_s"):  # fmt: skip
        values = run.metrics[name].copy()
        values[8:] -= values[7]
        run.metrics[name] = values
    run.events.append({"event": "training_started", "updates_done": 8})
    again = measured(run, CONFIG)
    assert (again.sample_s, again.text_s, again.row_s) == pytest.approx((0.5, 0.25, 0.25))
    assert again.num_updates == 8


@pytest.mark.parametrize("recipe", read_recipes())
def test_a_probe_of_every_recipe_is_a_valid_run(recipe: str):
    student = ["student.init.from=teacher", "student.init.num_layers=2", "critic.warmup_updates=3"]
    config = load_config(None, [f"recipe={recipe}", *student], PRESETS)
    short = probe_config(config, "/tmp/probe")
    short.validate()
    assert short.replay.lock_step and short.tracking.to == [] and short.critic.warmup_updates == 0


def test_the_fewest_devices_are_one_for_each_actor():
    text = replace(CONFIG, recipe=RecipeConfig(teacher_gives="text", loss="forward_kl"))
    assert fewest_devices(text) == 4  # the teacher stays beside the proxy
    wide = with_settings(CONFIG, {"scoring.tensor_parallel_size": 4})
    assert fewest_devices(wide) == 6


def test_a_device_that_is_too_small_is_refused_with_the_size_that_fits():
    class Sizes:
        def memory_of_devices(self) -> dict[str, int]:
            return {"teacher": 100 << 30, "rollout": 10 << 30, "learner": 90 << 30}

    wide = with_settings(CONFIG, {"scoring.tensor_parallel_size": 2})
    sizes: Any = Sizes()
    (error,) = list(_lacking(sizes, wide, 80.0))
    assert "the teacher lacks 20.0 GiB, the learner lacks 10.0 GiB" in str(error)
    assert "scoring.tensor_parallel_size=4" in str(error) and "learner.micro_batch_tokens" in str(error)
    assert list(_lacking(sizes, wide, 100.0)) == []


def test_another_teacher_is_not_predicted():
    other = replace(CONFIG, teacher=replace(CONFIG.teacher, model="another"))
    with pytest.raises(ConfigError, match=r"teacher\.model"):
        predict(found(), other, SETUP)
