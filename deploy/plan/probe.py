"""Measures a configuration's devices in a short run of its own."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

from deploy.plan.measured import Measured, measured
from deploy.report.run_files import read_run
from deploy.run.progress import Progress
from deploy.run.train import RunFailed, train
from distill.config import RunConfig
from distill.config.tree import with_settings

NUM_UPDATES = 6


def probe(config: RunConfig, progress: Progress) -> Measured:
    """Train a few updates in a temporary folder, in lock-step with one engine of each kind, and read what they took.

    Raises: what a training raises.
    """
    with tempfile.TemporaryDirectory(prefix="distill-plan-") as folder:
        short = probe_config(config, f"{folder}/run")
        progress.say(f"measuring {NUM_UPDATES} updates with one engine of each kind")
        try:
            train(short, progress)
        except RunFailed as failure:  # it names a folder that is deleted now
            raise failure.error from failure
        return measured(read_run(short.run_dir), short)


def probe_config(config: RunConfig, run_dir: str) -> RunConfig:
    """The configuration of a short run with as little beside its updates as possible."""
    rows = NUM_UPDATES * config.learner.teacher_rows_per_update
    changes: dict[str, Any] = {
        "learner.num_updates": NUM_UPDATES,
        "replay.max_policy_age": 0,
        "replay.samples_per_insert": 1.0,
        "replay.max_times_sampled": 1,
        "replay.min_size_to_sample": 0,
        "critic.warmup_updates": 0,
        "recipe.fraction_step": 0.0,
        "proxy.num_updates": 0,
        "tracking.to": [],
        "rollout.replicas": 1,
        "scoring.replicas": 1,
        "evaluation.every": 0,
        "evaluation.num_prompts": 2,
        "evaluation.num_prompts_during": 2,
        "checkpoint.every": NUM_UPDATES,
        "scoring.check": 0,
        "sft.enabled": False,
    }
    if config.corpus.num_prompts is None or config.corpus.num_prompts > rows:
        changes["corpus.num_prompts"] = rows
    return with_settings(replace(config, run_dir=run_dir), changes)
