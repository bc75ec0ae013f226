"""The replay index: the ledger of draws and the groups of each update, without rows, files or clock.

Every method returns at once, with an empty result when there is nothing to return now;
:mod:`distill.replay.service` turns empty results into waits. The two tables contain the draws, and
:class:`~distill.replay.holdings.Holdings` who works on which. The index connects them: deliveries, leases,
acknowledgements, commits, versions, and the state for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from distill.config import ReplayConfig
from distill.interfaces import Holder, Kind, Lease, SampleRef, Work
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.handout import Handout
from distill.replay.holdings import Holdings
from distill.replay.ledger import DrawState, ReplayError, Shares, TrainedDraws, VersionHistory
from distill.replay.limiter import RateLimiter
from distill.replay.past import IndexPast
from distill.replay.payload_cache import PayloadCache, SegmentUse
from distill.replay.student_table import StudentTable
from distill.replay.teacher_table import TeacherTable

_ISSUES_PER_LINEAGE = 1000
"""More than a draw is ever issued again between two returns to a checkpoint. What is issued after a return has other ids
than what was issued before it, and may still come in."""


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
        samples_per_prompt: int,
        pools: Shares = Shares(),  # noqa: B008 (frozen)
    ) -> None:
        """``pools``: numbers of rollout and of scoring actors, which matter in lock-step only."""
        self._replay = replay
        self._plan = plan
        self._limiter = RateLimiter(replay, plan, num_updates)
        self._student_order = student_order
        self._teacher_order = teacher_order
        self.samples_per_prompt = samples_per_prompt
        self._shares = pools if replay.lock_step else Shares()
        self.num_updates = num_updates
        self.num_refused = 0
        """Samples that were not taken, in this process's time."""
        self.holdings = Holdings()
        """Who works on what."""
        self._lineage = 0
        self._start(0, TrainedDraws(), VersionHistory())

    def _start(
        self,
        updates_done: int,
        trained: TrainedDraws,
        versions: VersionHistory,
        payloads: Iterable[SampleRef] = (),
    ) -> None:
        """``payloads``: scored rows of teacher text that are known."""
        for order in (self._student_order, self._teacher_order):
            if order is not None:
                order.first_issue = self._lineage * _ISSUES_PER_LINEAGE
        self.updates_done = updates_done
        self.updates_committed = updates_done
        self.updates_acknowledged = updates_done
        self._leases: dict[int, Lease] = {}
        self._num_sampled = 0
        self._open = False
        self.holdings.clear()
        self._segments = SegmentUse()
        self._cache = PayloadCache(self._segments, self._replay.max_bytes, payloads)
        self._student = StudentTable(
            self._replay,
            self._plan,
            self._limiter,
            self._student_order,
            self._segments,
            self._shares,
            self.samples_per_prompt,
            trained,
            versions,
        )
        self._teacher = TeacherTable(
            self._plan,
            self._teacher_order,
            self._cache,
            self._shares.scoring,
            self._replay.lock_step,
            updates_done,
        )
        self._handout = Handout(
            self._student, self._teacher, self.holdings, self._shares, lock_step=self._replay.lock_step
        )
        self._teacher.admit_through(self._limiter.teacher_updates(updates_done))

    @property
    def next_update(self) -> int:
        """The first update that is not leased."""
        return self.updates_committed + len(self._leases)

    @property
    def finished(self) -> bool:
        return self.updates_done >= self.num_updates

    # Actors

    def has_work(self, kind: Kind) -> bool:
        """Whether :meth:`take` may return something to an actor of this kind."""
        return self._handout.has_work(kind)

    def take(self, holder: Holder, room: int) -> list[Work]:
        """Return new work for an actor; see :meth:`distill.replay.handout.Handout.take`."""
        return self._handout.take(holder, room)

    def deliver(self, holder: Holder, done: Sequence[SampleRef]) -> list[str]:
        """Add finished samples; returns the ``work_id`` of those that no draw waits for.

        Raises: ReplayError for a student's sample without policy version.
        """
        accepted = [self._handout.accept(holder, sample, self.next_update) for sample in done]
        refused = [sample.work_id for sample, is_in in zip(done, accepted, strict=True) if not is_in]
        self.num_refused += len(refused)
        if done:
            self._cache.evict()
            self._admit()
        return refused

    def forget(self, holder: Holder) -> int:
        """Declare an actor dead: refuse what it may still send, and give its work to others.

        Returns how many pieces of work it held.
        """
        return self._handout.forget(holder)

    def _admit(self) -> None:
        """Admit what the limiter allows; before the first ``advance`` the engines' weights are unknown."""
        if self._open and not self.finished:
            self._student.admit(self.updates_done, self.next_update)

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
        for table, items in ((self._student, student_groups), (self._teacher, teacher_rows)):
            for item in items:
                table.items.lease(item, update)
        self._num_sampled += len(student_groups)
        self._leases[update] = Lease(
            update=update,
            groups=tuple(item.group for item in [*student_groups, *teacher_rows]),
            policy_ages=tuple(self._student.age(item, update) for item in student_groups),
        )
        self._admit()
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
        """Record that every engine has ``policy_version``. ``updates_done`` falls if the learner went back."""
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
        self._admit()

    def set_student_share(self, share: float) -> list[tuple[int, float]]:
        """Change the share from the first update on that has no admitted draw; returns all shares.

        Teacher draws are admitted furthest ahead (see RateLimiter). The share is absolute, so a
        learner that went back to its checkpoint can set it again.
        """
        self._plan.set_share(self._teacher.updates_admitted, share)
        self._admit()
        return list(self._plan.shares)

    def _rewind(self, update: int) -> None:
        """Void the acknowledgements from ``update`` on, because those updates are repeated."""
        self.updates_acknowledged = min(self.updates_acknowledged, update)
        self.updates_done = min(self.updates_done, update)
        self._student.rewind()
        self._mark_leased_items()

    def _mark_leased_items(self) -> None:
        for table in (self._student, self._teacher):
            table.items.mark_applied(self.updates_acknowledged)

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

    def load_state(
        self,
        state: dict[str, Any] | None,
        payloads: Iterable[SampleRef] = (),
        shares: list[tuple[int, float]] | None = None,
    ) -> None:
        """Continue from a checkpoint; None: from the start. Every draw that is not trained in it is issued again, in order.

        ``shares``: of student text, if they have changed since the checkpoint.

        Raises: ReplayError when the state belongs to a different plan.
        """
        if state is None:
            self._plan.load_shares(shares or self._plan.shares[:1])
            self._start(0, TrainedDraws(), VersionHistory(), payloads)
            return
        updates_done = int(state["updates_done"])
        trained = TrainedDraws.from_json(state["student_trained"])
        saved = [(int(first), float(share)) for first, share in state["student_shares"]]
        self._plan.load_shares(shares or saved)
        planned = self._plan.student_through(updates_done)
        if self._student.in_order and (trained.extra or trained.prefix != planned):
            raise ReplayError(
                "student_trained",
                f"{trained.prefix}+{len(trained.extra)}",
                f"be the {planned} draws of {updates_done} updates: the checkpoint was made with other settings",
                "resume with its config",
            )
        versions = VersionHistory((int(version), int(updates)) for version, updates in state["versions"])
        self._start(updates_done, trained, versions, payloads)

    def go_back(self, state: dict[str, Any] | None) -> bool:
        """Go back with the learner to the checkpoint that has this state; None: to the start of the run.

        Returns whether everything in flight was forgotten.

        In lock-step everything since then is drawn again, by the weights that draw it in a run without a failure.
        Otherwise rows stay, also those by weights that are lost: their tokens have the log-probabilities under
        the weights that sampled them, and their age is bounded as ever.
        """
        updates_done = int(state["updates_done"]) if state else 0
        if not self._replay.lock_step and updates_done >= self.updates_committed:
            self.commit(updates_done)
            return False
        self._lineage += 1
        self.load_state(state)
        return True

    def take_over(self, past: IndexPast) -> None:
        """Continue the work of an index that has died, with what the driver knows of it.

        Leases stay as they were, because the learner has used their rows or is using them. Everything else in flight
        is issued again, and what the actors still send of it is refused.
        """
        self._lineage = past.lineage
        self.load_state(past.state, past.payloads, past.student_shares)
        for holder in past.dead:
            self.holdings.forget(holder)
        for lease in past.leases:
            self._teacher.admit_through(lease.update + 1)
            for group in lease.groups:
                if group.draw.table == "student_text":
                    self._student.restore(group, lease.update)
                else:
                    self._teacher.items.lease(self._teacher.items[group.draw.number], lease.update)
            self._leases[lease.update] = lease
        self.updates_acknowledged = max(self.updates_acknowledged, past.updates_acknowledged)
        self._mark_leased_items()
        for version, updates in past.versions:
            if version > self._student.versions.newest:
                self._student.versions.record(version, updates)
        if past.versions:
            # A checkpoint can be durable before the engines have its weights.
            _, self.updates_done = past.versions[-1]
            self._open = True
            self._teacher.admit_through(self._limiter.teacher_updates(self.updates_done))
            self._admit()

    # Observation

    def live_segments(self, names: Iterable[str]) -> list[str]:
        """Return those of the segments that contain a row which is still needed."""
        return self._segments.live(names)

    def stats(self) -> dict[str, float]:
        tables = {"student_text": self._student.items, "teacher_text": self._teacher.items}
        states = {
            f"replay/{table}.{state.name.lower()}": float(items.num(state))
            for table, items in tables.items()
            for state in DrawState
            if (table, state) != ("teacher_text", DrawState.GENERATED)
        }
        inserted = self._student.num_inserted
        return states | {
            "replay/bytes": float(self._segments.live_bytes),
            "replay/samples_per_insert": self._num_sampled / inserted if inserted else 0.0,
            "replay/num_expired": float(self._student.num_expired),
            "replay/num_refused": float(self.num_refused),
            "replay/num_cached_rows": float(len(self._cache)),
            "replay/num_cache_hits": float(self._cache.num_hits),
            "replay/num_evicted_rows": float(self._cache.num_evicted),
        }
