"""What a run exports, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.run.telemetry import exporter as module
from deploy.run.telemetry import names
from deploy.run.telemetry.exporter import Exporter, export_repeatedly
from deploy.run.training.advice import Setup
from deploy.run.training.run import export


class Kept:
    """A meter that keeps what it was given."""

    def __init__(self) -> None:
        self.gauges: dict[tuple[str, ...], float] = {}
        self.counters: dict[tuple[str, ...], float] = {}
        self.num_calls = 0

    def set(self, name: str, description: str, value: float, labels: Mapping[str, str]) -> None:
        assert description and labels["run_id"] == "run"
        self.num_calls += 1
        self.gauges[(name, *(value for key, value in labels.items() if key != "run_id"))] = value

    def add(self, name: str, description: str, amount: float, labels: Mapping[str, str]) -> None:
        assert description and labels["run_id"] == "run" and amount >= 0
        key = (name, *(value for key, value in labels.items() if key != "run_id"))
        self.counters[key] = self.counters.get(key, 0.0) + amount


def test_a_row_is_exported_once_with_its_limiting_stage() -> None:
    meter = Kept()
    exporter = Exporter(meter, "run")
    row = {"critic/teacher_text.d_mm": 0.5, "teacher/busy_share": 0.9, "learner/busy_share": 0.4}
    setup = Setup(max_policy_age=3)
    exporter.facts({"update": 3, "row": row, "alarms": ["weak"], "setup": setup})
    assert meter.gauges == {
        ("distill_critic_teacher_text_d_mm", "learner"): 0.5,
        ("distill_teacher_busy_share", "teacher"): 0.9,
        ("distill_learner_busy_share", "learner"): 0.4,
        ("distill_advice", "the teacher limits the run; scoring.replicas=2"): 2.0,
        ("distill_update",): 3,
        ("distill_alarms",): 1,
        ("distill_limits", "rollout"): 0,
        ("distill_limits", "teacher"): 1,
        ("distill_limits", "learner"): 0,
    }
    before = meter.num_calls
    exporter.facts({"update": 3, "row": row, "alarms": ["weak"]})
    assert meter.num_calls == before + 1  # the alarms
    exporter.facts({"update": 4, "row": {"learner/busy_share": 1.0}, "setup": setup})
    assert meter.gauges["distill_advice", "the teacher limits the run; scoring.replicas=2"] == 0
    assert meter.gauges["distill_advice", "the learner limits the run; no setting would help"] == 1


def test_counters_of_actors_rise_by_what_was_added() -> None:
    meter = Kept()
    exporter = Exporter(meter, "run")
    for busy_s, tokens in (
        (2.0, 10.0),
        (5.0, 40.0),
        (1.0, 4.0),
    ):  # a new actor with the old one's name at the end
        exporter.actors({"rollout-0.1": {"timing/rollout_busy_s": busy_s, "rollout/num_tokens": tokens}})
    exporter.actors({"teacher-0.1": {"timing/teacher_starved_s": 7.0}})
    assert meter.counters == {
        ("distill_actor_seconds", "rollout", "rollout-0.1", "busy"): 6,
        ("distill_actor_tokens", "rollout", "rollout-0.1"): 44,
        ("distill_actor_seconds", "teacher", "teacher-0.1", "starved"): 7,
    }


def test_every_state_of_an_actor_is_exported() -> None:
    """The actors' statistics and the exporter's table name the same counters."""
    sources = [Path("actors/rollout.py"), Path("actors/teacher.py"), Path("learner/process/worker.py"),
               Path("distill/replay/service.py")]  # fmt: skip
    text = "".join((Path(__file__).parents[3] / source).read_text() for source in sources)
    for name in [*names.ACTOR_STATES, *names.ACTOR_TOKEN_COUNTERS]:
        assert f'"{name}"' in text


async def test_the_machine_is_exported_and_a_folder_that_is_gone_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "EXPORT_EVERY_S", 0.0)
    meter = Kept()

    async def counters() -> Mapping[str, Mapping[str, float]]:
        return {"rollout-0": {"rollout/num_tokens": 5.0}, "replay": {}}

    task = asyncio.create_task(
        export_repeatedly(
            Exporter(meter, "run"), dict, counters, lambda: {"total": 1}, tmp_path, tmp_path / "absent"
        )
    )
    while not meter.counters:
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert meter.gauges[("distill_memory_bytes", "total")] == 1
    assert ("distill_free_bytes", "run folder") in meter.gauges
    assert ("distill_free_bytes", "shared memory") not in meter.gauges


async def test_an_export_that_fails_ends_with_a_warning(tmp_path: Path) -> None:
    """And the run goes on, because the task ends without an error."""

    class NoRay:
        def metrics_address(self) -> str:
            raise RuntimeError("the agent is gone")

    said: list[str] = []
    run: Any = SimpleNamespace(backend=NoRay(), progress=SimpleNamespace(say=said.append))
    unused: Any = None
    await export(run, unused, unused, unused)
    assert said == ["warning: the run exports no numbers any more (the agent is gone)"]
