"""A run of real actors, whose processes are killed and stopped one after another in an order that a seed draws.

`make chaos` does that about fifty times in one run, with vLLM for students and teachers:

    python -m tests.chaos.soak
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import psutil

from distill.config.load import load_config
from distill.replay.draws import BatchPlan
from tests.chaos.victims import Victims, assert_audit_is_clean, ended_within
from tests.integration.test_pools import TWO, check_ledger
from tests.integration.test_train import assert_nothing_shared
from tests.tiny import make_world

BEAT_S = 8.0
STALL_S = 20.0
CHECKPOINT_EVERY = 50
MAX_POLICY_AGE = 2
UPDATES_AFTER = 200
"""Updates of the last start, after the last failure."""
SETTINGS = [
    *TWO,
    f"replay.max_policy_age={MAX_POLICY_AGE}",
    "learner.num_updates=1000000",
    "evaluation.every=100",
    f"checkpoint.every={CHECKPOINT_EVERY}",
    f"cluster.beat_timeout_s={BEAT_S:.0f}",
    f"cluster.stall_timeout_s={STALL_S:.0f}",
    "checkpoint.wait_for_room_s=10",
    f"weights.deadline_s={STALL_S:.0f}",
    "cluster.max_restarts=1000",
]
AFTER_LOAD_S = {"rollout": 10.0, "teacher": 10.0, "learner": 15.0, "replay": 15.0}
"""Bounds of what a restart costs beside the start of the process and the load of its model or checkpoint, in seconds."""
ENGINE_DEATH_S = 5.0
"""Seconds after the death of an actor within which its engine's processes end."""


@dataclass(frozen=True)
class Kind:
    """One way in which a run can fail."""

    name: str
    victims: tuple[str, ...]
    """Roles with numbers, of which a failure takes one; none for the processes on which the whole run depends."""
    fail: Callable[[Victims, str], str | None]
    """Makes it fail; returns the name of the actor that is to be replaced, or None if the run has to be resumed."""


@dataclass(frozen=True)
class Recovery:
    """What one failure cost."""

    kind: str
    seconds: float
    """From the kill or stop until an heir served, or until the resumed run had made a new update."""
    after_load_s: float | None = None
    """Of these, those that neither noticing took nor the start of the process and the load. None: the run was resumed."""


def kill_actor(victims: Victims, actor: str) -> str:
    name, process = victims.actor(actor)
    engine = process.children(recursive=True)
    process.kill()
    ended_within(engine, 2 * ENGINE_DEATH_S)
    return name


def stop_actor(victims: Victims, actor: str) -> str:
    name, process = victims.actor(actor)
    process.suspend()
    return name


def fail_engine(fail: Callable[[psutil.Process], None], victims: Victims, actor: str) -> str:
    name, core = victims.engine_of(actor)
    fail(core)
    return name


def kill_actor_of_stopped_engine(victims: Victims, actor: str) -> str:
    """The engine stands still, so that it cannot notice that it has no parent any more."""
    name, core = victims.engine_of(actor)
    _, process = victims.actor(actor)
    core.suspend()
    process.kill()
    ended_within([core], 2 * ENGINE_DEATH_S)
    return name


def kill_driver(victims: Victims, _: str) -> None:
    victims.kill_driver()


def fail_service(
    name: str, fail: Callable[[psutil.Process], None], says: str, victims: Victims, _: str
) -> None:
    """Without this process of the run's Ray, no heir can start: the run ends with one line."""
    family = victims.family()
    (service,) = (process for process in family if process.name() == name)
    fail(service)
    output = victims.wait(120, exit_code=1)
    line = f"the run failed: Ray must live; its process {name} ({service.pid}) {says}"
    assert line in output.splitlines()[-2], output[-2000:]
    assert "Traceback" not in output
    ended_within(family, 15.0)


ROLLOUTS, TEACHERS = ("rollout-0", "rollout-1"), ("teacher-0", "teacher-1")
OF_ACTORS = [
    Kind("rollout: killed", ROLLOUTS, kill_actor),
    Kind("rollout: stopped", ROLLOUTS, stop_actor),
    Kind("rollout: engine core killed", ROLLOUTS, partial(fail_engine, psutil.Process.kill)),
    Kind("rollout: engine core stopped", ROLLOUTS, partial(fail_engine, psutil.Process.suspend)),
    Kind("rollout: killed, engine core stopped", ROLLOUTS, kill_actor_of_stopped_engine),
    Kind("teacher: killed", TEACHERS, kill_actor),  # vLLM's engine for scoring is in the process of the actor
    Kind("teacher: stopped", TEACHERS, stop_actor),
    Kind("learner: killed", ("learner",), kill_actor),
    Kind("learner: stopped", ("learner",), stop_actor),
    Kind("replay: killed", ("replay",), kill_actor),
    Kind("replay: stopped", ("replay",), stop_actor),
]
OF_THE_RUN = [
    Kind("driver: killed", (), kill_driver),
    *(
        Kind(f"Ray's {name}: {what}", (), partial(fail_service, name, fail, says))
        for name in ("raylet", "gcs_server")
        for what, fail, says in (
            ("killed", psutil.Process.kill, "has ended"),
            ("stopped", psutil.Process.suspend, "has stood still for "),
        )
    ),
]
ROUND = [*OF_ACTORS, *OF_ACTORS, *OF_THE_RUN]
"""Those after which the run is resumed come less often, because they take longest."""


@dataclass(frozen=True)
class Uses:
    """How the surviving lineage of a run used its draws, counted from the lines of its ledger alone."""

    used: int
    lost: int
    """Draws of the plan that no update used."""
    twice: int
    """Draws that more than one update used, or one update twice."""

    @staticmethod
    def of(run: Path, num_updates: int) -> Uses:
        updates: dict[int, dict[str, list[list[int]]]] = {}
        for line in (run / "ledger.jsonl").read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # a kill has cut it
                continue
            if "update" in entry:
                updates[entry["update"]] = entry
            else:
                updates = {
                    number: each for number, each in updates.items() if number <= entry["updates_done"]
                }
        plan = BatchPlan.of(load_config(run / "config.yaml", (), None))
        used = lost = twice = 0
        for table, num_planned in (
            ("student_text", plan.student_through(num_updates)),
            ("teacher_text", plan.teacher_through(num_updates)),
        ):
            counts = Counter(draw for update in updates.values() for draw, _, _ in update[table])
            used += len(counts)
            lost += len(set(range(num_planned)) - set(counts))
            twice += sum(count > 1 for count in counts.values())
        return Uses(used, lost, twice)


class Soak:
    """Makes a run fail again and again, and checks what is promised of each failure."""

    def __init__(self, world: Path, name: str, settings: Sequence[str], seed: int) -> None:
        self.victims = Victims(world, name, *SETTINGS, *settings)
        self.recoveries: list[Recovery] = []
        self._random = random.Random(seed)

    def run(self, kinds: Sequence[Kind], say: Callable[[str], object] = lambda line: None) -> Uses:
        """Let everything happen in random order; then kill the driver, and let the resumed run end as planned.

        Raises: AssertionError when something that is promised does not hold.
        """
        victims = self.victims
        with victims:
            victims.until_update(1)
            for number, kind in enumerate(self._random.sample(kinds, len(kinds)), 1):
                self._fail(kind)
                seconds = self.recoveries[-1].seconds
                say(f"{number}/{len(kinds)} {kind.name}: {seconds:.1f} s, update {victims.last_update()}")
            victims.kill_driver()
            num_updates = victims.last_update() + UPDATES_AFTER
            victims.resume(f"learner.num_updates={num_updates}")
            victims.until_another_update()
            family = victims.family()
            victims.finish()
            ended_within(family, 5.0)
        return self._at_the_end(num_updates)

    def _fail(self, kind: Kind) -> None:
        victims = self.victims
        time.sleep(self._random.uniform(0.0, 2.0))  # so that it comes in any phase of an update
        before = victims.last_update()
        began = time.monotonic()
        name = kind.fail(victims, self._random.choice(kind.victims) if kind.victims else "")
        if name is None:
            victims.resume()
            victims.until_another_update()
            self.recoveries.append(Recovery(kind.name, time.monotonic() - began))
            return
        event = victims.until_replaced(name)
        seconds = time.monotonic() - began
        after_load_s = event["seconds"] - event["loading_s"]
        role = name.partition("-")[0]
        assert after_load_s <= 2 * AFTER_LOAD_S[role], event
        if role == "learner":
            again = before - victims.learner_resumed_after()
            assert again <= 2 * CHECKPOINT_EVERY, f"{again} updates were made again"
        victims.until_another_update()
        self.recoveries.append(Recovery(kind.name, seconds, after_load_s))

    def _at_the_end(self, num_updates: int) -> Uses:
        run = self.victims.run
        check_ledger(run, num_updates, MAX_POLICY_AGE)
        assert_nothing_shared(run)
        assert_audit_is_clean(run, num_updates)
        uses = Uses.of(run, num_updates)
        assert (uses.lost, uses.twice) == (0, 0), uses
        return uses


def figures(recoveries: Sequence[Recovery]) -> list[str]:
    """The costs by kind, as rows of a table in Markdown."""
    rows = [
        "| failure | times | seconds: median | worst | beside noticing and loading: worst |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(sorted(each.kind for each in recoveries)):
        of_kind = [each for each in recoveries if each.kind == name]
        seconds = [each.seconds for each in of_kind]
        beside = [each.after_load_s for each in of_kind if each.after_load_s is not None]
        worst = f"{max(beside):.1f}" if beside else ""
        rows.append(f"| {name} | {len(of_kind)} | {median(seconds):.1f} | {max(seconds):.1f} | {worst} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Let a run of real actors fail in every way, again and again."
    )
    parser.add_argument("--rounds", type=int, default=2, help=f"of {len(ROUND)} failures each")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the victims")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distill-chaos-") as folder:
        make_world(Path(folder))
        soak = Soak(Path(folder), "run", (), options.seed)
        uses = soak.run(ROUND * options.rounds, partial(print, flush=True))
    print("\n".join(figures(soak.recoveries)))
    print(f"{uses.used} draws used")
    seconds = [each.seconds for each in soak.recoveries]
    print(
        f"kills: {len(seconds)}, lost: {uses.lost}, twice: {uses.twice}, "
        f"recovery median {median(seconds):.1f} s, worst {max(seconds):.1f} s"
    )


if __name__ == "__main__":
    main()
