"""How often actors may be started again, and what a run hears of the one that failed last."""

from __future__ import annotations

import pytest

from deploy.cluster.failures import ActorFailed, ActorGone
from deploy.run.training.restarts import RestartBudget
from distill.config import ClusterConfig

DEAD = ActorFailed("rollout-0.1003", "", "live; it died (out of memory)")


def test_one_failure_too_many_names_the_actor_and_its_last_words():
    budget = RestartBudget(ClusterConfig(max_restarts=2, restart_window_s=60.0), now=lambda: 0.0)
    budget.take("rollout-0.1000", DEAD)
    budget.take("teacher-0.1000", DEAD)
    with pytest.raises(
        ActorFailed,
        match=r"^rollout-0\.1003 must live; it failed after 2 restarts within 60 s, the last time by: .*out of memory.*; "
        r"correct what it says, or raise cluster\.max_restarts; then resume the run$",
    ) as caught:
        budget.take("rollout-0.1003", DEAD)
    assert caught.value.__cause__ is DEAD
    assert budget.num_restarts == 2


def test_restarts_count_only_within_the_window():
    times = iter([0.0, 50.0, 61.0, 100.0, 112.0])
    budget = RestartBudget(ClusterConfig(max_restarts=2, restart_window_s=60.0), now=lambda: next(times))
    for _ in range(3):
        budget.take("rollout-0", DEAD)
    with pytest.raises(ActorFailed):
        budget.take("rollout-0", DEAD)
    budget.take("rollout-0", DEAD)
    assert budget.num_restarts == 4


def test_without_restarts_the_first_failure_is_the_error():
    with pytest.raises(ActorFailed) as caught:
        RestartBudget(ClusterConfig(max_restarts=0)).take("rollout-0.1003", DEAD)
    assert caught.value is DEAD


def test_a_deadline_that_passes_again_and_again_uses_up_the_budget():
    """Each time, it takes so long to notice that the window has passed."""
    now = [0.0]
    budget = RestartBudget(ClusterConfig(max_restarts=2, restart_window_s=60.0), now=lambda: now[0])
    stalled = ActorGone.stalled("rollout-0.1000", 1000.0, 1000.0)
    for _ in range(2):
        now[0] += 1000.0
        budget.take("rollout-0.1000", stalled)
    now[0] += 1000.0
    with pytest.raises(ActorFailed, match="after 2 restarts within 3000 s"):
        budget.take("rollout-0.1000", stalled)
