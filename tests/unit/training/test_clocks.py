"""Which stage limits a run."""

from __future__ import annotations

import pytest

from deploy.run.training.clocks import COUNTED_S, StageClocks, held_back, limit_of


def test_shares_count_since_the_last_call_and_per_actor() -> None:
    now = [100.0]
    stages = StageClocks(lambda: now[0])
    counters = {"timing/rollout_busy_s": 6.0, "rollout/num_actors": 2.0, "timing/learner_total_busy_s": 4.0}
    now[0] += 10
    shares = stages.shares(counters)
    assert shares == pytest.approx({"rollout/busy_share": 0.3, "learner/busy_share": 0.4, COUNTED_S: 10})
    limit = limit_of(shares)
    assert limit is not None and (limit.stage, limit.busy_share) == ("learner", pytest.approx(0.4))
    now[0] += 5
    shares = stages.shares(counters | {"timing/rollout_busy_s": 15.0})
    assert shares == pytest.approx({"rollout/busy_share": 0.9, "learner/busy_share": 0.0, COUNTED_S: 5})
    limit = limit_of(shares)
    assert limit is not None and limit.stage == "rollout"


def test_without_counters_there_is_no_limit() -> None:
    assert limit_of(StageClocks().shares({})) is None


def test_what_evaluations_and_checkpoints_held_back() -> None:
    timing_s = {"training": 50.0, "push_waited_for_evaluations": 1.0, "update_waited_for_milestones": 0.5}
    assert (
        held_back(timing_s)
        == "evaluations and checkpoints held new rollouts back for at most 3.0 % of the training"
    )
