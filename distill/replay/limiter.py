"""The rate limiter: how many draws may be admitted. Called by the replay index; pure arithmetic."""

from __future__ import annotations

from distill.config import ReplayConfig, rule
from distill.replay.draws import BatchPlan
from distill.replay.ledger import ReplayError


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

    Text draws do not age. They are admitted one update further, so that the teacher has
    work while the next weights are on their way.
    """

    def __init__(self, replay: ReplayConfig, plan: BatchPlan, num_updates: int) -> None:
        self._replay = replay
        self._plan = plan
        self.num_updates = num_updates
        for name, value, must, remedy in _violations(replay, plan):
            raise ReplayError(rule(name, value, must, remedy))

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


def _violations(replay: ReplayConfig, plan: BatchPlan) -> list[tuple[str, object, str, str]]:
    """Settings that would starve the learner or break the age bound."""
    if not plan.may_use_student:
        return []
    found: list[tuple[str, object, str, str]] = []
    if replay.samples_per_insert < 1:
        found.append(
            ("replay.samples_per_insert", replay.samples_per_insert, "be >= 1",
             "with fewer uses than inserts the buffer grows and its groups pass replay.max_policy_age")
        )  # fmt: skip
    if replay.max_times_sampled < replay.samples_per_insert:
        found.append(
            ("replay.max_times_sampled", replay.max_times_sampled,
             f"be >= replay.samples_per_insert ({replay.samples_per_insert})", "groups run out; raise it")
        )  # fmt: skip
    if replay.lock_step and replay.samples_per_insert != 1:
        found.append(
            ("replay.samples_per_insert", replay.samples_per_insert, "be 1 when replay.max_policy_age=0",
             "a re-used group is older than 0 updates; raise max_policy_age")
        )  # fmt: skip
    return found
