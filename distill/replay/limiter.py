"""The rate limiter: how many draws may be admitted. Called by the replay index; pure arithmetic."""

from __future__ import annotations

from distill.config import ReplayConfig
from distill.replay.draws import BatchPlan


class RateLimiter:
    r"""Bounds the draws that are admitted, from the number of updates done.

    With needed = student_through(min(updates_done + max_policy_age + 1, num_updates)), the
    student draws admitted so far never exceed

        max(ceil(needed / samples_per_insert), min(min_size_to_sample, needed), admitted + shortfall)

    The first term is the age bound: a draw that update u uses is admitted when at least
    u - max_policy_age updates are done, so no token of it is older than max_policy_age. The
    second fills the buffer to the size asked for, with no group that would be used too late.
    The third is 0 draws more unless groups are re-used: a random choice may leave the update
    at hand fewer usable groups than it needs, everything in flight included; that shortfall
    is admitted, or the learner would wait forever.

    Settings that would starve the learner or break the age bound are refused by the configuration
    (:class:`distill.config.ReplayConfig`), not here.

    Text draws do not age. They are admitted one update further, so that the teacher has
    work while the next weights are on their way.
    """

    def __init__(self, replay: ReplayConfig, plan: BatchPlan, num_updates: int) -> None:
        self._replay = replay
        self._plan = plan
        self.num_updates = num_updates

    def student_draws(self, updates_done: int) -> int:
        """The bound without shortfall."""
        needed = self._plan.student_through(self._horizon(updates_done, 1))
        inserts = -int(-needed // self._replay.samples_per_insert)
        return max(inserts, min(self._replay.min_size_to_sample, needed))

    def teacher_updates(self, updates_done: int) -> int:
        """Number of updates whose text draws are admitted."""
        return self._horizon(updates_done, 2)

    def min_size(self, obtainable: int) -> int:
        """Scored student groups that must be there before any is sampled.

        ``obtainable``: groups that can be there before the next update is done; towards the
        end of a run they are fewer than ``min_size_to_sample``, which would then never be met.
        """
        return min(self._replay.min_size_to_sample, obtainable)

    def _horizon(self, updates_done: int, ahead: int) -> int:
        return min(updates_done + self._replay.max_policy_age + ahead, self.num_updates)
