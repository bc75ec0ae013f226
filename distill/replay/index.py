"""The replay index: the ledger of draws and the groups of each update, without rows, files or clock.

Every method returns at once, with an empty result when there is nothing to return now;
:mod:`distill.replay.service` turns empty results into waits. The two tables contain the draws. The
index connects them: leases, acknowledgements, commits, versions, and the state for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from distill.config import ReplayConfig
from distill.interfaces import Draw, GroupRef, Lease, ScoringJob
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.ledger import DrawState, Item, ReplayError, Stage, TrainedDraws, VersionHistory
from distill.replay.limiter import RateLimiter
from distill.replay.payload_cache import PayloadCache, SegmentUse
from distill.replay.student_table import StudentTable
from distill.replay.teacher_table import TeacherTable


class ReplayIndex:
    """Draws pass through drawn -> dispatched -> generated -> scored -> leased -> trained.

    Three counters describe the progress of a run: ``updates_committed`` (in a durable checkpoint) <=
    ``updates_acknowledged`` (applied) <= ``next_update`` (leased). ``updates_done`` is the number of
    updates in the engines' weights; it bounds admission (see RateLimiter). Student draws wait for the
    first ``advance``, because until then the engines' weights are in an unknown state.
    """

    def __init__(
        self,
        *,
        replay: ReplayConfig,
        plan: BatchPlan,
        student_order: DrawOrder | None,
        teacher_order: DrawOrder | None,
        num_updates: int,
    ) -> None:
        self._replay = replay
        self._plan = plan
        self._limiter = RateLimiter(replay, plan, num_updates)
        self._student_order = student_order
        self._teacher_order = teacher_order
        self.num_updates = num_updates
        self._start(0, TrainedDraws(), VersionHistory())

    def _start(self, updates_done: int, trained: TrainedDraws, versions: VersionHistory) -> None:
        self.updates_done = updates_done
        self.updates_committed = updates_done
        self.updates_acknowledged = updates_done
        self._leases: dict[int, Lease] = {}
        self._num_sampled = 0
        self._open = False
        self._segments = SegmentUse()
        self._cache = PayloadCache(self._segments, self._replay.max_bytes)
        self._student = StudentTable(
            self._replay, self._plan, self._limiter, self._student_order, self._segments, trained, versions
        )
        self._teacher = TeacherTable(
            self._plan, self._teacher_order, self._cache, self._replay.lock_step, updates_done
        )
        self._teacher.admit_through(self._limiter.teacher_updates(updates_done))

    @property
    def next_update(self) -> int:
        """The first update that is not leased."""
        return self.updates_committed + len(self._leases)

    @property
    def finished(self) -> bool:
        return self.updates_done >= self.num_updates

    # Rollout actors

    def admit(self, max_draws: int) -> list[Draw]:
        """Return the prompts to roll out next; in lock-step all of the update's, regardless of ``max_draws``."""
        if not self._open or self.finished:
            return []
        return self._student.admit(max_draws, self.updates_done, self.next_update)

    def insert(self, groups: Sequence[GroupRef]) -> None:
        """Add rolled-out groups, all or none.

        Raises: ReplayError for a draw that is unknown, already inserted, or no longer dispatched.
        """
        self._student.insert(groups)
        self._cache.evict()

    def requeue(self, draw_ids: Iterable[str], stage: Stage | None = None) -> int:
        """Give back the draws of a dead actor; returns how many of them it still had.

        ``stage``: the actor's work. Pass it when ``draw_ids`` can include draws that the actor had
        finished, because a live actor of the other kind can have those by now.
        """
        tables = {"student_text": self._student, "teacher_text": self._teacher}
        num_returned = 0
        for draw_id in draw_ids:
            table, _, rest = draw_id.partition("-")
            num_returned += tables[table].requeue(draw_id, int(rest.partition("-")[2]), stage)
        return num_returned

    # Teacher actors

    def take_for_scoring(self, max_groups: int) -> ScoringJob:
        """Return student groups first, because they age, then teacher draws.

        In lock-step a job is of one update and one kind.
        """
        if self._replay.lock_step:
            groups = self._student.take_for_scoring(max_groups)
            draws = [] if groups else self._teacher.take_for_scoring(max_groups)
        else:
            groups = self._student.take_for_scoring(max_groups)
            draws = self._teacher.take_for_scoring(max_groups - len(groups))
        return ScoringJob(groups=tuple(groups), teacher_draws=tuple(draws))

    def insert_scored(self, groups: Sequence[GroupRef]) -> None:
        """Add groups with their payload, all or none.

        Raises: ReplayError for a draw that no teacher actor was scoring.
        """
        rows = [group for group in groups if group.draw.table == "teacher_text"]
        self._teacher.check_expected(rows)
        self._student.insert_scored([group for group in groups if group.draw.table == "student_text"])
        self._teacher.insert_scored(rows)
        self._cache.evict()

    # Learner

    def lease(self, update: int) -> Lease | None:
        """Return the groups of ``update``: student groups by draw number, then teacher rows.

        Returns None while some are missing. An update has the same lease until it is
        committed. A call for an acknowledged update means that the learner went back to its checkpoint.

        Raises: ReplayError when updates are leased out of order.
        """
        if update >= self.num_updates:
            return None
        if not self.updates_committed <= update <= self.next_update:
            raise ReplayError(
                "update",
                update,
                f"be in [{self.updates_committed}, {self.next_update}]: earlier updates are committed, "
                "later ones follow an update that is not leased",
                "resume from the newest checkpoint",
            )
        if update == self.next_update:
            return self._new_lease(update)
        if update < self.updates_acknowledged:
            self._rewind(update)
        return self._leases[update]

    def _new_lease(self, update: int) -> Lease | None:
        teacher_rows = self._teacher.select(update)
        student_groups = self._student.select(update, self.updates_done)
        if teacher_rows is None or student_groups is None:
            return None
        for item in [*student_groups, *teacher_rows]:
            item.lease(update)
        self._num_sampled += len(student_groups)
        self._leases[update] = Lease(
            update=update,
            groups=tuple(item.stored for item in [*student_groups, *teacher_rows]),
            policy_ages=tuple(self._student.age(item, update) for item in student_groups),
        )
        return self._leases[update]

    def acknowledge(self, update: int) -> None:
        """Record that the update was applied, provisionally until ``commit``."""
        if update < self.updates_acknowledged:
            return
        if update != self.updates_acknowledged or update not in self._leases:
            raise ReplayError(
                "update",
                update,
                f"be the next one to acknowledge ({self.updates_acknowledged}), and leased",
                "acknowledge every update, in order, after its lease",
            )
        self.updates_acknowledged += 1
        self._mark_leased_items()

    def advance(self, updates_done: int, policy_version: int) -> None:
        """Record that every engine has ``policy_version``, the weights after ``updates_done`` updates.

        If ``updates_done`` falls, the learner went back to its checkpoint.
        """
        if not self.updates_committed <= updates_done <= self.next_update:
            raise ReplayError(
                "updates_done",
                updates_done,
                f"be in [{self.updates_committed}, {self.next_update}]: no other updates are committed or leased",
                "resume from the newest checkpoint",
            )
        self._student.versions.record(policy_version, updates_done)
        if updates_done < self.updates_done:
            self._rewind(updates_done)
        self.updates_done = updates_done
        self._open = True
        self._student.versions.forget_before(updates_done - self._replay.max_policy_age - 1)
        self._teacher.admit_through(self._limiter.teacher_updates(updates_done))

    def set_student_share(self, share: float) -> None:
        """Change the share from the first update on that has no admitted draw.

        Teacher draws are admitted furthest ahead (see RateLimiter). The share is absolute, so a
        learner that went back to its checkpoint can set it again.
        """
        self._plan.set_share(self._teacher.updates_admitted, share)

    def _rewind(self, update: int) -> None:
        """Void the acknowledgements from ``update`` on, because those updates are repeated."""
        self.updates_acknowledged = min(self.updates_acknowledged, update)
        self.updates_done = min(self.updates_done, update)
        self._student.rewind()
        self._mark_leased_items()

    def _mark_leased_items(self) -> None:
        for item in self._leased_items():
            done = item.last_update < self.updates_acknowledged
            item.state = DrawState.TRAINED if done else DrawState.LEASED

    def _leased_items(self) -> list[Item]:
        items = [*self._student.items.values(), *self._teacher.items.values()]
        return [item for item in items if item.state >= DrawState.LEASED]

    # Checkpoints

    def commit(self, updates_done: int) -> None:
        """Record that the checkpoint with ``updates_done`` updates is durable.

        The draws of those updates are final, and groups that are used up are removed.
        """
        if updates_done > self.updates_acknowledged:
            raise ReplayError(
                "updates_done",
                updates_done,
                f"be <= {self.updates_acknowledged}, the updates acknowledged",
                "commit only what a checkpoint contains",
            )
        numbers = self._student_numbers(updates_done)
        for update in range(self.updates_committed, updates_done):
            del self._leases[update]
        self.updates_committed = max(self.updates_committed, updates_done)
        self._student.commit(numbers, self.updates_committed, self.next_update)
        self._teacher.commit(self.updates_committed)
        self._cache.evict()

    def _student_numbers(self, updates_done: int) -> list[int]:
        """Return the student draws that the first ``updates_done`` updates lease."""
        leases = [lease for update, lease in self._leases.items() if update < updates_done]
        return [
            group.draw.number
            for lease in leases
            for group in lease.groups
            if group.draw.table == "student_text"
        ]

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint of the updates acknowledged so far, as JSON.

        Teacher draws need no entry: ``updates_done`` determines which of them are trained.
        """
        numbers = self._student_numbers(self.updates_acknowledged)
        return {
            "updates_done": self.updates_acknowledged,
            "policy_version": self._student.versions.newest,
            "versions": self._student.versions.to_json(),
            "student_trained": self._student.trained.with_numbers(numbers).to_json(),
            "student_shares": [list(entry) for entry in self._plan.shares],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Every draw that is not trained in it is issued again, in order.

        The index forgets all locations, so stores that are open must be opened anew.

        Raises: ReplayError when the state belongs to a different plan.
        """
        updates_done = int(state["updates_done"])
        trained = TrainedDraws.from_json(state["student_trained"])
        self._plan.load_shares([(int(first), float(share)) for first, share in state["student_shares"]])
        planned = self._plan.student_through(updates_done)
        if self._student.in_order and (trained.extra or trained.prefix != planned):
            raise ReplayError(
                "student_trained",
                f"{trained.prefix}+{len(trained.extra)}",
                f"be the {planned} draws of {updates_done} updates: the checkpoint was made with other settings",
                "resume with its config",
            )
        versions = VersionHistory((int(version), int(updates)) for version, updates in state["versions"])
        self._start(updates_done, trained, versions)

    # Observation

    def freed_segments(self, writer_prefix: str) -> dict[str, int]:
        """Return a writer's segments without a live group, each with its number of groups ever inserted.

        The index announces a freed segment exactly once, unless another group of it is inserted
        later; the store remembers the announcement.
        """
        return self._segments.take_freed(writer_prefix)

    def stats(self) -> dict[str, float]:
        stats = {
            f"replay/{table}.{state.name.lower()}": 0.0
            for table in ("student_text", "teacher_text")
            for state in DrawState
            if (table, state) != ("teacher_text", DrawState.GENERATED)
        }
        for item in [*self._student.items.values(), *self._teacher.items.values()]:
            stats[f"replay/{item.draw.table}.{item.state.name.lower()}"] += 1
        inserted = self._student.num_inserted
        return stats | {
            "replay/bytes": float(self._segments.live_bytes),
            "replay/samples_per_insert": self._num_sampled / inserted if inserted else 0.0,
            "replay/num_expired": float(self._student.num_expired),
            "replay/num_cached_rows": float(len(self._cache)),
            "replay/num_cache_hits": float(self._cache.num_hits),
            "replay/num_evicted_rows": float(self._cache.num_evicted),
        }
