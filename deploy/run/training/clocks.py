"""Which stage limits a run: the one whose actors are busy for the largest part of the time.

An actor is busy while its engine has work. Otherwise it stores rows or waits: a rollout actor is blocked by the rate
limiter, and teacher actors and the learner are starved. In lock-step the stages take turns, so their parts add up to about one; when
they work at the same time, each can be busy all the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

STAGES = {
    "rollout": ("timing/rollout_busy_s", "rollout/num_actors"),
    "teacher": ("timing/teacher_busy_s", "teacher/num_actors"),
    "learner": ("timing/learner_total_busy_s", None),
}
"""Per stage: the counter of its busy seconds, and that of its actors."""
COUNTED_S = "timing/counted_s"
"""The seconds to which the shares of a row refer. In lock-step they contain evaluations and checkpoints, which those of the
update do not."""
REMEDIES = {
    "rollout": "raise rollout.replicas or rollout.max_num_seqs",
    "teacher": "raise scoring.replicas",
    "learner": "give the learner more threads or a GPU, or lower critic.positions_per_step",
}
"""What moves the limit of each stage."""


@dataclass(frozen=True)
class Limit:
    """The stage that limits a run."""

    stage: str
    busy_share: float
    """Part of the time in which one of its actors was busy, on average."""


class StageClocks:
    """Turns counters of busy seconds into parts of the time between two calls."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last: dict[str, float] = {}
        self._since = now()

    def shares(self, counters: Mapping[str, float]) -> dict[str, float]:
        """Return ``<stage>/busy_share`` since the last call, for each stage that has counters, and :data:`COUNTED_S`.

        A call that ends between two calls counts with its whole duration in the second, so a share can exceed one.
        """
        now = self._now()
        elapsed_s, self._since = now - self._since, now
        shares: dict[str, float] = {COUNTED_S: elapsed_s}
        for stage, (busy, actors) in STAGES.items():
            if busy not in counters:
                continue
            spent_s = counters[busy] - self._last.get(busy, 0.0)
            self._last[busy] = counters[busy]
            num_actors = counters.get(actors, 1.0) if actors else 1.0
            shares[f"{stage}/busy_share"] = spent_s / max(elapsed_s, 1e-9) / max(num_actors, 1.0)
        return shares


def limit_of(row: Mapping[str, float]) -> Limit | None:
    """Return the limiting stage of a row with shares; None without any."""
    shares = {stage: row[f"{stage}/busy_share"] for stage in STAGES if f"{stage}/busy_share" in row}
    if not shares:
        return None
    stage = max(shares, key=lambda each: shares[each])
    return Limit(stage, shares[stage])


def held_back(timing_s: Mapping[str, float]) -> str:
    """Say how much of an overlapping training evaluations and checkpoints cost. ``timing_s``: its seconds by activity."""
    waited_s = timing_s["push_waited_for_evaluations"] + timing_s["update_waited_for_milestones"]
    share = waited_s / max(timing_s["training"], 1e-9)
    return (
        f"evaluations and checkpoints held new rollouts back for at most {100 * share:.1f} % of the training"
    )
