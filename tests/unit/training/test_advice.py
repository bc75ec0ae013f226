"""What an advice predicts happens when it is followed, in runs of engines that wait."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.plan.load import Load, Service, waiting_config
from deploy.plan.simulate import simulate
from deploy.run.training.advice import Advice, Setup, advise, mean_row

BASE = Load(
    config=waiting_config(
        num_rollouts=8, num_teachers=4, prompts_per_update=16, num_updates=24, max_policy_age=3
    ),
    rollout=Service(1.0),
    teacher=Service(0.25),
    update=Service(1 / 16),
    push_s=0.1,
)
IN_TURNS = BASE.changed({"replay.max_policy_age": 0})
SMALL = BASE.changed({"rollout.replicas": 2, "scoring.replicas": 1})
AMPLE = BASE.changed({"rollout.replicas": 32, "scoring.replicas": 8})
FEW_AHEAD = replace(
    BASE.changed({"rollout.replicas": 32, "replay.max_policy_age": 1}),
    teacher=Service(0.1),
    update=Service(0.6 / 16),
)


def advice_of(load: Load) -> Advice:
    advice = advise(simulate(load).row, Setup(max_policy_age=load.config.replay.max_policy_age))
    assert advice is not None
    return advice


@pytest.mark.parametrize(
    ("load", "changes"),
    [
        (BASE, {"rollout.replicas": 16}),
        (BASE.changed({"scoring.replicas": 1}), {"scoring.replicas": 2}),
        (
            replace(SMALL, teacher=Service(0.4), update=Service(0.1 / 16)),
            {"rollout.replicas": 4, "scoring.replicas": 2},
        ),
        (IN_TURNS, {"replay.max_policy_age": 2}),
        (
            replace(IN_TURNS, rollout=Service(0.1), teacher=Service(0.5), update=Service(0.3 / 16)),
            {"scoring.replicas": 8},
        ),
        (replace(IN_TURNS, rollout=Service(4.0)), {"rollout.replicas": 16}),
        (FEW_AHEAD, {"replay.max_policy_age": 3}),
    ],
    ids=["rollout", "teacher", "both", "in turns", "teacher in turns", "rollout in turns", "few ahead"],
)
def test_an_advice_that_is_followed_brings_what_it_predicts(load: Load, changes: dict[str, int]):
    advice = advice_of(load)
    assert advice.changes == changes and advice.gain >= 1.1
    gain = simulate(load.changed(advice.changes)).samples_per_s / simulate(load).samples_per_s
    assert gain == pytest.approx(advice.gain, rel=1 / 3)
    assert f"about {advice.gain:.1f} times as fast" in advice.text


def test_a_faster_learner_is_the_advice_where_no_setting_helps():
    advice = advice_of(AMPLE)
    assert not advice.changes and advice.stage == "learner"
    bound = float(advice.text.partition("up to ")[2].partition(" ")[0])
    faster = replace(AMPLE, update=Service(AMPLE.update.each_s / bound))
    gain = simulate(faster).samples_per_s / simulate(AMPLE).samples_per_s
    assert gain == pytest.approx(bound, rel=1 / 3)


ROW = {
    "rollout/busy_share": 0.6,
    "rollout/num_actors": 1.0,
    "teacher/busy_share": 0.1,
    "teacher/num_actors": 1.0,
    "learner/busy_share": 0.3,
}


def test_cores_that_all_work_are_the_limit():
    every = dict.fromkeys(("rollout", "teacher", "learner"), 2)
    advice = advise(ROW, Setup(max_policy_age=0, num_cores=2, num_threads=every))
    assert advice is not None and not advice.changes
    assert "all 2 cores are in use" in advice.text


def test_cores_bound_what_a_change_can_bring():
    every = dict.fromkeys(("rollout", "teacher", "learner"), 2)
    free, bound = Setup(max_policy_age=0), Setup(max_policy_age=0, num_cores=3, num_threads=every)
    without, within = advise(ROW, free), advise(ROW, bound)
    assert without is not None and without.gain == pytest.approx(1 / 0.6)
    assert within is not None and within.gain == pytest.approx(1.5)


def test_actors_that_would_divide_the_cores_anew_are_not_advised():
    """With all threads given out, a second rollout actor would only halve those of the first."""
    full = {"rollout": 4, "teacher": 4, "learner": 8}
    row = ROW | {"rollout/busy_share": 0.95, "learner/busy_share": 0.2}
    advice = advise(row, Setup(max_policy_age=2, num_cores=8, num_threads=full))
    assert advice is not None and "rollout.replicas" not in advice.changes
    free = advise(row, Setup(max_policy_age=2, num_cores=8, num_threads={**full, "rollout": 2, "teacher": 2}))
    assert free is not None and free.changes == {"rollout.replicas": 2}


def test_without_student_text_the_sampler_is_not_a_stage_to_enlarge():
    advice = advise(ROW, Setup(max_policy_age=0, uses_student_text=False))
    assert advice is not None and advice.stage == "learner" and not advice.changes


def test_without_a_setup_nothing_is_predicted():
    advice = advise(ROW, None)
    assert advice is not None and not advice.changes
    assert advice.text == (
        "the rollout limits the run (busy for 60 % of the time); "
        "to move that limit, raise rollout.replicas or rollout.max_num_seqs"
    )


@pytest.mark.parametrize("row", [{}, {"loss": 1.0}, {"learner/busy_share": 0.0}], ids=str)
def test_a_row_without_shares_has_no_advice(row: dict[str, float]):
    assert advise(row, Setup(max_policy_age=0)) is None


def test_a_setup_comes_back_from_its_event():
    setup = Setup(max_policy_age=2, num_cores=4, num_threads={"rollout": 1})
    assert Setup.read(vars(setup)) == setup
    for torn in (None, {}, {"max_policy_age": "2", "num_cores": 4, "num_threads": {}}, {"num_threads": 3}):
        assert Setup.read(torn) is None


def test_the_mean_of_rows_weighs_them_with_their_seconds():
    rows = [
        {"rollout/busy_share": 0.2, "rollout/num_actors": 1.0, "timing/counted_s": 3.0},
        {"rollout/busy_share": 1.0, "rollout/num_actors": 2.0, "timing/counted_s": 1.0},
    ]
    assert mean_row(rows) == pytest.approx({"rollout/busy_share": 0.4, "rollout/num_actors": 2.0})
