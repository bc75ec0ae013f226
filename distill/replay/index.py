"""The replay index: the ledger of draws and the groups of each update, without rows, files or clock.

Every method returns at once; "nothing now" is an empty answer. :mod:`distill.replay.service`
turns those into waits. The tables hold the draws, the index holds what is between them:
leases, acknowledgements, commits, versions, and the state that a checkpoint carries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from distill.config import ReplayConfig
from distill.interfaces import Draw, GroupRef, Lease, ScoringJob
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.ledger import DrawState, Item, ReplayError, Stage, TrainedDraws, VersionHistory
from distill.replay.limiter import RateLimiter
from distill.replay.payload_cache import PayloadCache, SegmentLedger
from distill.replay.student_table import StudentTable
from distill.replay.teacher_table import TeacherTable


class ReplayIndex:
    """Draws go drawn -> dispatched -> generated -> scored -> leased -> trained.

    Three counters say how far a run is: ``updates_committed`` (in a durable checkpoint) <=
    ``updates_acknowledged`` (applied) <= ``next_update`` (leased). ``updates_done`` is the
    update of the weights that the engines hold; it opens admission (see RateLimiter). Student
    draws wait for the first ``advance``: until then the engines hold nobody knows which weights.
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
        self._text_order = teacher_order
        self.num_updates = num_updates
        self._start(0, TrainedDraws(), VersionHistory())

    def _start(self, updates_done: int, trained: TrainedDraws, versions: VersionHistory) -> None:
        self.updates_done = updates_done
        self.updates_committed = updates_done
        self.updates_acknowledged = updates_done
        self._leases: dict[int, Lease] = {}
        self._num_sampled = 0
        self._open = False
        self._segments = SegmentLedger()
        self._cache = PayloadCache(self._segments, self._replay.max_bytes)
        self._student = StudentTable(
            self._replay, self._plan, self._limiter, self._student_order, self._segments, trained, versions
        )
        self._teacher = TeacherTable(
            self._plan, self._text_order, self._cache, self._replay.lock_step, updates_done
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
        """Prompts to roll out next; in lock-step all of the update's, whatever ``max_draws``."""
        if not self._open or self.finished:
            return []
        return self._student.admit(max_draws, self.updates_done, self.next_update)

    def insert(self, groups: Sequence[GroupRef]) -> None:
        """Rolled-out groups, all or none.

        Raises: ReplayError for a draw that is unknown, already here, or given to another actor.
        """
        self._student.insert(groups)
        self._cache.evict()

    def requeue(self, draw_ids: Iterable[str], stage: Stage | None = None) -> int:
        """Give back the draws that a dead actor held; returns how many it still did.

        ``stage``: what the actor did. Say it when its list may hold draws that it had
        finished: those may be with a live actor of the other kind by now.
        """
        tables = {"student_text": self._student, "teacher_text": self._teacher}
        held = 0
        for draw_id in draw_ids:
            table, _, rest = draw_id.partition("-")
            held += tables[table].requeue(draw_id, int(rest.partition("-")[2]), stage)
        return held

    # Teacher actors

    def take_for_scoring(self, max_groups: int) -> ScoringJob:
        """Student groups first, since they age, then text; in lock-step one update's of one kind."""
        if self._replay.lock_step:
            groups = self._student.take_for_scoring(max_groups)
            draws = [] if groups else self._teacher.take_for_scoring(max_groups)
        else:
            groups = self._student.take_for_scoring(max_groups)
            draws = self._teacher.take_for_scoring(max_groups - len(groups))
        return ScoringJob(groups=tuple(groups), teacher_draws=tuple(draws))

    def insert_scored(self, groups: Sequence[GroupRef]) -> None:
        """Groups with their payload, all or none.

        Raises: ReplayError as :meth:`insert`.
        """
        rows = [group for group in groups if group.draw.table == "teacher_text"]
        self._teacher.check_expected(rows)
        self._student.insert_scored([group for group in groups if group.draw.table == "student_text"])
        self._teacher.insert_scored(rows)
        self._cache.evict()

    # Learner

    def lease(self, update: int) -> Lease | None:
        """The groups of ``update``: student groups by draw number, then text. None while some lack.

        The same update gives the same groups until it is committed. Asking for one that was
        acknowledged means that the learner went back to its checkpoint.

        Raises: ReplayError when updates are leased out of order.
        """
        if update >= self.num_updates:
            return None
        if not self.updates_committed <= update <= self.next_update:
            raise ReplayError(
                "update",
                update,
                f"lie in [{self.updates_committed}, {self.next_update}]: updates below are committed, "
                "updates above come after one that is not leased",
                "resume from the newest checkpoint",
            )
        if update == self.next_update:
            return self._new_lease(update)
        if update < self.updates_acknowledged:
            self._rewind(update)
        return self._leases[update]

    def _new_lease(self, update: int) -> Lease | None:
        text = self._teacher.select(update)
        students = self._student.select(update, self.updates_done)
        if text is None or students is None:
            return None
        for item in [*students, *text]:
            item.lease(update)
        self._num_sampled += len(students)
        self._leases[update] = Lease(
            update=update,
            groups=tuple(item.stored for item in [*students, *text]),
            policy_ages=tuple(self._student.age(item, update) for item in students),
        )
        return self._leases[update]

    def acknowledge(self, update: int) -> None:
        """The update was applied; provisional until ``commit``."""
        if update < self.updates_acknowledged:
            return
        if update != self.updates_acknowledged or update not in self._leases:
            raise ReplayError(
                "update",
                update,
                f"be the next leased one ({self.updates_acknowledged})",
                "acknowledge every update, in order, after its lease",
            )
        self.updates_acknowledged += 1
        self._mark_leased_items()

    def advance(self, updates_done: int, policy_version: int) -> None:
        """Every engine holds ``policy_version``, the weights after ``updates_done`` updates.

        Fewer updates than before mean that the learner went back to its checkpoint.
        """
        if not self.updates_committed <= updates_done <= self.next_update:
            raise ReplayError(
                "updates_done",
                updates_done,
                f"lie in [{self.updates_committed}, {self.next_update}]: no other updates are committed or leased",
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
        """Of the updates to come, from the first one on of which no draw is admitted yet.

        Text is admitted furthest (see RateLimiter). The share is absolute, so a learner that went
        back to its checkpoint may say it again.
        """
        self._plan.set_share(self._teacher.updates_admitted, share)

    def _rewind(self, update: int) -> None:
        """Acknowledgements from ``update`` on are void: those updates are done again."""
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
        """The checkpoint with ``updates_done`` updates is durable: their draws are final, their bytes free."""
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
        """Student draws of the leases below ``updates_done``."""
        leases = [lease for update, lease in self._leases.items() if update < updates_done]
        return [
            group.draw.number
            for lease in leases
            for group in lease.groups
            if group.draw.table == "student_text"
        ]

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the updates acknowledged so far holds, as JSON.

        Text needs no entry: which of its draws are trained follows from ``updates_done``.
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
        """Go on from a checkpoint. Every draw that is not trained in it is issued again, in order.

        Locations are forgotten, so stores that are still open must be opened anew.

        Raises: ReplayError when the state is of another plan.
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
        """Segments of a writer without a live group, each with its number of groups ever inserted.

        A segment is told once, until another group of it is inserted; the store remembers.
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
