"""Which alarms are raised, when, and that each is raised once."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from distill.evaluation import EXTRA_METRICS, METRICS, Evaluation
from distill.run.alarms import WINDOW, Alarms

SOUND = {"critic/teacher_text.tightness": 0.9, "critic/student_text.tightness": 0.9, "critic/teacher_text.d_mm": 0.5,
         "policy/student_text.tv_early": 0.3, "policy/student_text.tv_late": 0.31}  # fmt: skip


def at(tv: float, spread: float = 0.001) -> Evaluation:
    """An evaluation of eight prompts of ten tokens; ``spread``: noise that pairing does not remove."""
    noise = spread * np.random.default_rng(int(1e6 * tv)).normal(size=8)
    columns = {"prompt_index": np.arange(8)}
    for name in (*METRICS, *EXTRA_METRICS):
        columns[f"{name}.sum"] = 10 * (tv + noise - noise.mean())
        columns[f"{name}.weight"] = np.full(8, 10.0)
    return Evaluation("step-1", pa.table(columns))


def raised(alarms: Alarms, count: int = WINDOW, **changes: float) -> list[str]:
    row = SOUND | {name.replace("__", "/", 1).replace("__", "."): value for name, value in changes.items()}
    return [message for _ in range(count) for message in alarms.after_update(row)]


def test_a_sound_run_raises_no_alarm():
    alarms = Alarms()
    assert raised(alarms, 3 * WINDOW) == []
    assert alarms.after_evaluation(at(0.5)) == alarms.after_evaluation(at(0.4)) == []
    assert raised(Alarms(), 3 * WINDOW, critic__teacher_text__tightness=0.61) == []


def test_a_skipped_update_is_reported_once_and_at_once():
    alarms = Alarms()
    assert raised(alarms, 1, learner__num_nonfinite=0) == []
    (message,) = raised(alarms, 3, learner__num_nonfinite=1)
    assert message.startswith("an update was skipped, because its numbers were not finite")


def test_a_weak_critic_is_reported_once():
    alarms = Alarms()
    assert raised(alarms, WINDOW - 1, critic__student_text__tightness=0.3) == []  # it can be young
    assert (
        "critic/student_text.tightness is 0.30" in raised(alarms, 1, critic__student_text__tightness=0.3)[0]
    )
    assert raised(alarms, WINDOW, critic__student_text__tightness=0.3) == []  # once


def test_drift_is_reported():
    assert "TV grows along" in raised(Alarms(), policy__student_text__tv_late=0.34)[0]
    assert raised(Alarms(), policy__student_text__tv_late=0.32) == []


def test_a_gamed_critic_is_reported_unless_by_chance():
    alarms = Alarms()
    raised(alarms)
    assert alarms.after_evaluation(at(0.40)) == []
    raised(alarms, critic__teacher_text__d_mm=0.4)
    assert "held-out TV rose from 0.400 to 0.410" in alarms.after_evaluation(at(0.41))[0]
    by_chance = Alarms()
    raised(by_chance)
    by_chance.after_evaluation(at(0.40, spread=0.1))
    raised(by_chance, critic__teacher_text__d_mm=0.4)
    assert by_chance.after_evaluation(at(0.41, spread=0.1)) == []
    falling_both = Alarms()
    raised(falling_both)
    falling_both.after_evaluation(at(0.40))
    raised(falling_both, critic__teacher_text__d_mm=0.4)
    assert falling_both.after_evaluation(at(0.39)) == []


def test_recipes_without_critics_raise_no_alarm():
    alarms = Alarms()
    for _ in range(2 * WINDOW):
        assert alarms.after_update({"policy/teacher_text.tv": 0.5}) == []
    assert alarms.after_evaluation(at(0.5)) == alarms.after_evaluation(at(0.6)) == []


@pytest.mark.parametrize("interrupted_after", range(0, 3 * WINDOW, 7))
def test_a_resumed_run_raises_the_alarms_of_an_uninterrupted_one(interrupted_after: int):
    rows = [
        SOUND
        | {
            "critic/teacher_text.d_mm": 0.5 - 0.002 * update,
            "critic/student_text.tightness": 0.9 if update < WINDOW else 0.1,
        }
        for update in range(3 * WINDOW)
    ]
    evaluations = {10: at(0.40), 40: at(0.41)}

    def run(alarms: Alarms, updates: range) -> list[str]:
        messages = []
        for update in updates:
            messages += alarms.after_update(rows[update])
            if update in evaluations:
                messages += alarms.after_evaluation(evaluations[update])
        return messages

    whole = run(Alarms(), range(3 * WINDOW))
    assert len(whole) == 2  # a weak critic, and a gamed one
    alarms = Alarms()
    before = run(alarms, range(interrupted_after))
    state = json.loads(json.dumps(alarms.state()))
    last = max((update for update in evaluations if update < interrupted_after), default=None)
    assert (state["evaluation"] is None) == (last is None)
    resumed = Alarms.resume(state, rows[:interrupted_after], None if last is None else evaluations[last])
    assert before + run(resumed, range(interrupted_after, 3 * WINDOW)) == whole
    assert list(resumed.raised.values()) == whole
