"""The rate limiter of the replay index: how many draws may be admitted."""

from __future__ import annotations

from distill.config import ReplayConfig
from distill.replay.draws import BatchPlan


class RateLimiter:
    r"""Bounds the number of admitted draws by the number of updates done.

    With needed = student_through(min(updates_done + max_policy_age + 1, num_updates)), the
    student draws admitted so far never exceed

        max(ceil(needed / samples_per_insert), min(min_size_to_sample, needed), admitted + shortfall)

    The first term is the age bound: a draw that update u uses is admitted when at least
    u - max_policy_age updates are done, so none of its tokens is older than max_policy_age. The
    second term fills the buffer to its required size, without groups that would be used too late.
    The third term matters only if groups are re-used: the random choice can leave fewer usable
    groups, everything in flight included, than the next update needs. That shortfall is admitted,
    because the learner would wait forever otherwise.

    The configuration (:class:`distill.config.ReplayConfig`) rejects settings that would starve the
    learner or break the age bound.

    Teacher draws do not age. They are admitted one update further, so that the teacher has
    work while the next weights are on their way.
    """

    def __init__(self, replay: ReplayConfig, plan: BatchPlan, num_updates: int) -> None:
        self._replay = replay
        self._plan = plan
        self.num_updates = num_updates

    def student_draws(self, updates_done: int) -> int:
        """Return the bound without shortfall."""
        needed = self._plan.student_through(self._horizon(updates_done, 1))
        inserts = -int(-needed // self._replay.samples_per_insert)
        return max(inserts, min(self._replay.min_size_to_sample, needed))

    def teacher_updates(self, updates_done: int) -> int:
        """Return the number of updates whose teacher draws are admitted."""
        return self._horizon(updates_done, 2)

    def min_size(self, obtainable: int) -> int:
        """Return the number of scored student groups that must exist before any is sampled.

        ``obtainable``: the groups that can exist before the next update is done. Towards the end of
        a run they are fewer than ``min_size_to_sample``, which could then never be reached.
        """
        return min(self._replay.min_size_to_sample, obtainable)

    def _horizon(self, updates_done: int, ahead: int) -> int:
        return min(updates_done + self._replay.max_policy_age + ahead, self.num_updates)
