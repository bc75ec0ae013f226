"""Every kind of actor is killed and stopped in one run of real Ray actors. It goes on, and nothing is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from actors.vllm_engine.processes import is_alive
from tests.chaos.victims import Victims
from tests.integration.test_pools import TWO, check_ledger
from tests.integration.test_train import (
    PLAIN,
    assert_nothing_shared,
    assert_same_numbers,
    start,
    train,
    world,
)

__all__ = ["world"]  # the fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def assert_audit_is_clean(run: Path, num_updates: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "audit", str(run)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{num_updates} updates, ")
    assert done.stdout.endswith("every draw adds up\n")


def test_an_asynchronous_run_loses_nothing(world: Path) -> None:
    """With vLLM's student, whose engine core is a process of its own."""
    num_updates = 400  # the run still trains when the last actor fails
    settings = [*TWO, "scoring.engine=transformers", "replay.max_policy_age=2", f"learner.num_updates={num_updates}",
                "evaluation.every=100", "checkpoint.every=50", "cluster.beat_timeout_s=4", "cluster.max_restarts=20"]  # fmt: skip
    with Victims(world, "asynchronous", *settings) as victims:
        victims.until_update(1)
        failed: list[str] = []

        def kill(actor: str) -> None:
            name, process = victims.actor(actor)
            process.kill()
            failed.append(victims.until_replaced(name))

        def stop(actor: str) -> None:
            name, process = victims.actor(actor)
            process.suspend()
            failed.append(victims.until_replaced(name))
            assert not is_alive(process)

        kill("teacher-1")
        stop("teacher-0")
        kill("learner")  # before the first checkpoint, or after it
        kill("replay")
        # The engine core dies alone.
        name, core = victims.engine_of("rollout-1")
        core.kill()
        failed.append(victims.until_replaced(name))
        # An actor dies whose engine core stands still, so that it cannot end itself.
        name, core = victims.engine_of("rollout-0")
        _, process = victims.actor("rollout-0")
        core.suspend()
        process.kill()
        end = time.monotonic() + 10
        while is_alive(core):
            assert time.monotonic() < end
            time.sleep(0.1)
        failed.append(victims.until_replaced(name))
        stop("rollout-0")
        stop("replay")
        stop("learner")
        assert not (victims.run / "summary.json").exists(), "the run has ended before the last failure"
        family = psutil.Process(victims.driver.pid).children(recursive=True)
        victims.finish()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert [event["member"] for event in victims.events("member_failed")] == failed
    check_ledger(victims.run, num_updates, 2)
    assert_audit_is_clean(victims.run, num_updates)
    assert_nothing_shared(victims.run)
    actors = json.loads((victims.run / "summary.json").read_text())["actors"]
    assert {name for name in failed if "." in name} < set(actors)  # what the failed ones did counts


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
    resumed = re.findall(r"the learner goes on after update (\d+)\n", output)
    assert resumed in (["0", "20"], ["0", "40"]), output
    resuming = start(world, "train", "--resume", str(victims.run))
    output, _ = resuming.communicate(timeout=300)
    assert resuming.returncode == 0, output[-4000:]
    assert_same_numbers(victims.run, whole)
    check_ledger(victims.run, 60, 0)
    assert_audit_is_clean(victims.run, 60)
    assert_nothing_shared(victims.run)


def test_a_run_whose_ray_ends_fails_with_one_line_and_resumes(world: Path) -> None:
    """No call to an actor returns without the raylet, and no heir can start."""
    settings = [*PLAIN, "learner.num_updates=60", "evaluation.every=0", "checkpoint.every=5"]
    with Victims(world, "without-ray", *settings) as victims:
        victims.until_update(6)
        family = psutil.Process(victims.driver.pid).children(recursive=True)
        (raylet,) = (process for process in family if process.name() == "raylet")
        raylet.kill()
        output, _ = victims.driver.communicate(timeout=120)
    assert victims.driver.returncode == 1, output[-4000:]
    assert "the run failed: Ray must live; its process raylet (" in output.splitlines()[-2]
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive, [process.cmdline()[:3] for process in alive]
    assert_nothing_shared(victims.run)
    resuming = start(world, "train", "--resume", str(victims.run))
    output, _ = resuming.communicate(timeout=300)
    assert resuming.returncode == 0, output[-4000:]
    assert_audit_is_clean(victims.run, 60)
