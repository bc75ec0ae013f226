"""The counters of a fleet for a reader who can do without some of them."""

from __future__ import annotations

from typing import Any

from deploy.cluster.failures import ActorGone
from deploy.run.training.fleet import Fleet, Member
from distill.interfaces import Holder


class Answers:
    """An actor that answers with its counters, or does not."""

    def __init__(self, counters: dict[str, float] | None) -> None:
        self._counters = counters

    async def within(self, seconds: float | None, method: str) -> dict[str, float]:
        assert method == "stats"
        if self._counters is None:
            raise ActorGone.silent("rollout-1", 1.0, "")
        return self._counters


async def test_an_actor_that_does_not_answer_hides_no_other() -> None:
    def member(role: Any, number: int, counters: dict[str, float] | None) -> Member:
        actor: Any = Answers(counters)
        return Member(Holder(role, number), actor)

    replay: Any = Answers({"timing/learner_starved_s": 3.0})
    learner: Any = Answers({"timing/learner_total_busy_s": 2.0})
    scorers = [member("teacher", 0, {"teacher/num_tokens": 5.0})]
    fleet = Fleet(
        replay=replay,
        learner=learner,
        rollouts=[member("rollout", 0, {"rollout/num_tokens": 1.0}), member("rollout", 1, None)],
        scorers=scorers,
        teachers=scorers,
    )
    assert await fleet.stats_now() == {
        str(Holder("rollout", 0)): {"rollout/num_tokens": 1.0},
        str(Holder("rollout", 1)): {},
        str(Holder("teacher", 0)): {"teacher/num_tokens": 5.0},
        "learner": {"timing/learner_starved_s": 3.0, "timing/learner_total_busy_s": 2.0},
    }
