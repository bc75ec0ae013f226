"""Hands the work of the two tables out to actors, and takes in what they deliver. Used by the index."""

from __future__ import annotations

from distill.interfaces import Holder, Kind, SampleRef, Work
from distill.replay.holdings import Holdings
from distill.replay.ledger import Shares
from distill.replay.student_table import StudentTable
from distill.replay.teacher_table import TeacherTable


class Handout:
    """Connects the tables, which know what is to be done, and the holdings, which know who does it."""

    def __init__(
        self,
        student: StudentTable,
        teacher: TeacherTable,
        holdings: Holdings,
        shares: Shares,
        *,
        lock_step: bool,
    ) -> None:
        self._student = student
        self._teacher = teacher
        self._holdings = holdings
        self._shares = shares
        self._lock_step = lock_step

    def has_work(self, kind: Kind) -> bool:
        """Whether :meth:`take` may return something to an actor of this kind."""
        if kind == "rollout":
            return self._student.has_work
        return self._student.has_samples or self._teacher.has_work

    def take(self, holder: Holder, room: int) -> list[Work]:
        """Return new work for an actor, at most ``room`` pieces of it.

        A rollout actor gets draws. A teacher actor gets samples first, because they age, then rows of teacher
        text. In lock-step an actor gets its whole share of an update regardless of its room, and a teacher
        actor work of one kind, so that timing does not decide what is computed together.
        """
        work: list[Work] = []
        if holder.kind == "rollout":
            work += self._student.take(holder.number % self._shares.rollout, room)
        else:
            share = holder.number % self._shares.scoring
            work += self._student.take_samples(share, room)
            if not (work and self._lock_step):
                work += self._teacher.take(share, room - len(work))
        for each in work:
            self._holdings.give(holder, each)
        return work

    def accept(self, holder: Holder, sample: SampleRef, next_update: int) -> bool:
        """Add a finished sample; returns whether a draw waits for it.

        A sample is refused if its sender does not hold its work: it is late, because the work was given
        to another actor, or a second version of one that is there. The same sample sent again is accepted
        again, and changes nothing.

        Raises: ReplayError for a student's sample without policy version.
        """
        accept = self._accept_rollout if holder.kind == "rollout" else self._accept_scored
        return accept(holder, sample, next_update)

    def forget(self, holder: Holder) -> int:
        """Fence an actor and give its work back; returns how many pieces it held."""
        held = self._holdings.forget(holder)
        for work in held:
            if isinstance(work, SampleRef):
                self._student.give_back_sample(work)
            elif work.table == "teacher_text":
                self._teacher.give_back(work)
            else:
                self._student.give_back(work)
        return len(held)

    def _accept_rollout(self, holder: Holder, sample: SampleRef, next_update: int) -> bool:
        work_id = sample.draw.work_id
        if not (self._holdings.holds(holder, work_id) and self._student.is_missing(sample)):
            return self._student.is_delivered(sample)
        if self._student.deliver(sample, next_update):
            self._holdings.finish(holder, work_id)
        return True

    def _accept_scored(self, holder: Holder, sample: SampleRef, next_update: int) -> bool:
        is_teacher_text = sample.draw.table == "teacher_text"
        work_id = sample.draw.work_id if is_teacher_text else sample.work_id
        held = self._holdings.holds(holder, work_id)
        self._holdings.finish(holder, work_id)
        if is_teacher_text:
            if held and self._teacher.is_dispatched(sample.draw):
                self._teacher.deliver(sample)
                return True
            return self._teacher.is_repeated(sample)
        if held and self._student.is_in_scoring(sample):
            self._student.deliver_scored(sample, next_update)
            return True
        return self._student.is_scored(sample)
