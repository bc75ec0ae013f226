"""Actors fail in a run in lock-step and before the training, and the numbers are those of a run without failures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.chaos.victims import Victims, assert_audit_is_clean
from tests.integration.test_pools import TWO, check_ledger
from tests.integration.test_train import (
    PLAIN,
    assert_nothing_shared,
    assert_same_numbers,
    start,
    train,
    world,
)
from tests.tiny import make_world

__all__ = ["world"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_in_lock_step_the_numbers_are_those_of_a_run_without_failure(world: Path) -> None:
    """An heir has the share of the one that failed, every sample has its own seed, and what a learner loses is drawn again.

    At last the driver is killed, and the run resumed.
    """
    settings = [*PLAIN, *TWO, "learner.num_updates=60", "evaluation.every=30", "checkpoint.every=20"]
    whole = train(world, "whole", *settings)
    with Victims(world, "broken", *settings) as victims:
        victims.until(lambda: victims.events("training_started"), timeout_s=300.0)
        for update, actor in (
            (0, "learner"),  # before the first checkpoint
            (1, "rollout-0"),
            (2, "replay"),
            (10, "teacher-0"),
            (22, "learner"),
            (24, "replay"),
        ):
            victims.until_update(update)
            name, process = victims.actor(actor)
            process.kill()
            victims.until_replaced(name)
        output = victims.kill_driver()
    assert "raylet" not in output, "Ray says in its own words what the run says"
    resumed = re.findall(r"the learner goes on after update (\d+)\n", output)
    assert resumed in (["0", "20"], ["0", "40"]), output
    resuming = start(world, "train", "--resume", str(victims.run))
    output, _ = resuming.communicate(timeout=300)
    assert resuming.returncode == 0, output[-4000:]
    assert_same_numbers(victims.run, whole)
    check_ledger(victims.run, 60, 0)
    assert_audit_is_clean(victims.run, 60)
    assert_nothing_shared(victims.run)


def test_the_stages_before_the_training_outlive_their_actors(tmp_path: Path) -> None:
    make_world(tmp_path)
    settings = [*PLAIN, *TWO, "sft.num_updates=200", "corpus.num_prompts=48", "corpus.max_new_tokens=32",
                "cluster.beat_timeout_s=4"]  # fmt: skip
    with Victims(tmp_path, "broken", *settings) as victims:
        for stage, actor in (("sft", "learner"), ("corpus", "corpus"), ("start_engines", "teacher-1")):
            victims.until(lambda stage=stage: stage in victims.stages(), timeout_s=300.0)
            victims.until(lambda actor=actor: victims.has_started(actor))
            _, process = victims.actor(actor)
            num_failed = len(victims.events("member_failed"))
            if actor == "learner":
                process.suspend()  # its progress is polled
            else:
                process.kill()
            victims.until(lambda before=num_failed: len(victims.events("member_failed")) > before)
        victims.finish()
    assert [event["member"].partition(".")[0] for event in victims.events("member_failed")] == [
        "learner",
        "corpus",
        "teacher-1",
    ]
    assert victims.output.count("the stage begins again") == 3
    shutil.rmtree(tmp_path / "cache")
    assert_same_numbers(victims.run, train(tmp_path, "whole", *settings))
