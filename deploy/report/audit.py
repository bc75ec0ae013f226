"""`distill audit`: whether every draw of a run was used as planned, none skipped and none too often.

The plan follows from the configuration, so what the run did (``ledger.jsonl``) is compared with what it had to do: the
order of the draws, the rows that they select, and how many each update uses. What a return to a checkpoint has undone
does not count. A run that samples its student draws from the buffer (``replay.max_times_sampled`` > 1) has no order: there,
only how often and how many are checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.config import RunConfig
from distill.errors import ConfigError, DistillError
from distill.replay.draws import BatchPlan, DrawOrder
from distill.replay.ledger import DrawState
from distill.replay.spans import TABLES
from distill.run.folder import RunFolder
from distill.run.ledger_file import LedgerReader, LedgerStart, LedgerUpdate
from distill.run.metrics import read_metrics


class LedgerWrong(DistillError, RuntimeError):
    """A run that did not use its draws as planned."""

    code = "ledger"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the ledger of a run says of the lineage that survives."""

    num_updates: int
    num_starts: int
    """How often the training started, anew or from a checkpoint."""
    num_undone: int
    """Updates that were made again."""
    num_broken: int
    """Lines that a crash cut."""
    used: dict[str, int]
    """Uses of draws by table."""
    reissued: dict[str, int]
    """Those of draws that had been issued before, by table."""
    states: dict[str, dict[str, int]]
    """By table, the draws that the replay knew at the last update whose metrics were written, by state. A draw that was trained
    is forgotten when a checkpoint has it."""
    most_uses: int
    """Of one student draw, as the configuration allows."""

    @property
    def lines(self) -> list[str]:
        """The audit for a terminal."""
        starts = "start" if self.num_starts == 1 else "starts"
        found = [
            f"{self.num_updates} updates, {self.num_starts} {starts} of the training, {self.num_undone} updates made again"
        ]
        found += [
            f"{table}: {count} draws used, {self.reissued[table]} of them issued more than once"
            for table, count in self.used.items()
        ]
        found += [
            f"{table} in the replay at the last update: "
            + ", ".join(f"{n} {state}" for state, n in counts.items())
            for table, counts in self.states.items()
        ]
        if self.num_broken:
            found.append(f"{self.num_broken} lines of the ledger were cut by a crash")
        if self.most_uses > 1:
            found.append(
                f"no student draw was used more than {self.most_uses} times, or twice in one update; every other draw adds up"
            )
        else:
            found.append("every draw adds up")
        return found


class _Lineage:
    """The updates that survive."""

    def __init__(self, entries: Iterable[LedgerStart | LedgerUpdate]) -> None:
        self.updates: dict[int, LedgerUpdate] = {}
        self.rows: dict[str, int] = {}
        """Of the tables from which draws select."""
        self.num_starts = self.num_undone = 0
        for entry in entries:
            if isinstance(entry, LedgerStart):
                self._go_back(entry)
            elif entry.update in self.updates:
                must = "be in the ledger once, unless a return to a checkpoint undid it"
                raise LedgerWrong("update", entry.update, must)
            else:
                self.updates[entry.update] = entry

    def _go_back(self, start: LedgerStart) -> None:
        self.num_starts += 1
        self.rows = start.rows
        undone = [update for update in self.updates if update > start.updates_done]
        for update in undone:
            del self.updates[update]
        self.num_undone += len(undone)


def audit(folder: RunFolder, config: RunConfig, ledger: Mapping[str, Any] | None) -> Audit:
    """Compare the ledger of a run with its plan.

    ``ledger``: the part of the newest checkpoint's state that the replay made, for a recipe that adapts its share of
    student text: the shares are there, and later updates, which can have others, are not checked.

    Raises: ConfigError without a ledger; LedgerWrong with the first draw that was not used as planned, and its history.
    """
    reader = LedgerReader(folder.ledger)
    try:
        lineage = _Lineage(reader)
    except OSError as error:
        must = f"be readable ({error.strerror})"
        raise ConfigError("ledger", folder.ledger, must, "audit a run that has trained") from error
    plan = BatchPlan.of(config)
    if ledger is not None:
        plan.load_shares([(int(first), float(share)) for first, share in ledger["student_shares"]])
        through = int(ledger["updates_done"])
        lineage.updates = {number: each for number, each in lineage.updates.items() if number <= through}
    check = _Check(config, plan, lineage.rows)
    try:
        check.all(lineage.updates)
    except _Wrong as wrong:
        history = "; ".join(_history(folder, wrong.table, wrong.number)) or "never used"
        raise LedgerWrong(f"draw {wrong.number} of {wrong.table}", history, wrong.must) from None
    uses = [
        (table, used) for each in lineage.updates.values() for table in TABLES for used in each.draws[table]
    ]
    return Audit(
        num_updates=len(lineage.updates),
        num_starts=lineage.num_starts,
        num_undone=lineage.num_undone,
        num_broken=reader.num_broken,
        used={table: sum(of == table for of, _ in uses) for table in TABLES},
        reissued={table: sum(of == table and used.issue > 0 for of, used in uses) for table in TABLES},
        states=_states(folder),
        most_uses=check.most_uses,
    )


def _states(folder: RunFolder) -> dict[str, dict[str, int]]:
    """The counts by table and state in the last row of the metrics; empty without one."""
    metrics = read_metrics(folder.path)
    last = metrics.slice(metrics.num_rows - 1).to_pylist()[0] if metrics.num_rows else {}
    counts = {
        table: {state.name.lower(): last.get(f"replay/{table}.{state.name.lower()}") for state in DrawState}
        for table in TABLES
    }
    known = {
        table: {state: int(count) for state, count in of_table.items() if count is not None}
        for table, of_table in counts.items()
    }
    return {table: of_table for table, of_table in known.items() if of_table}


def _history(folder: RunFolder, table: str, number: int) -> Iterator[str]:
    """Everything that the ledger says of a draw, in words."""
    updates: set[int] = set()
    incarnation = 0
    for entry in LedgerReader(folder.ledger):
        if isinstance(entry, LedgerStart):
            incarnation = entry.incarnation
            for update in sorted(each for each in updates if each > entry.updates_done):
                updates.remove(update)
                yield f"update {update} undone by a return to update {entry.updates_done}, in start {incarnation}"
        else:
            for used in entry.draws[table]:
                if used.number == number:
                    updates.add(entry.update)
                    yield f"used in update {entry.update} (row {used.row}, issue {used.issue}), in start {incarnation}"


class _Wrong(Exception):
    """A draw that was not used as planned."""

    def __init__(self, table: str, number: int, must: str) -> None:
        super().__init__(table, number, must)
        self.table = table
        self.number = number
        self.must = must


class _Check:
    """Compares updates with the plan."""

    def __init__(self, config: RunConfig, plan: BatchPlan, rows: Mapping[str, int]) -> None:
        self.most_uses = 1 if config.replay.lock_step else config.replay.max_times_sampled
        self._plan = plan
        self._orders = {
            table: DrawOrder(table, rows[table], config.seed) for table in TABLES if rows.get(table)
        }
        self._uses: Counter[int] = Counter()

    def all(self, updates: Mapping[int, LedgerUpdate]) -> None:
        """Raises: LedgerWrong for an update that is missing; _Wrong for the first draw."""
        newest = max(updates, default=0)
        for update in range(1, newest + 1):
            if update not in updates:
                raise LedgerWrong("update", update, f"be in the ledger, because update {newest} is")
            self._one(update - 1, updates[update])

    def _one(self, update: int, found: LedgerUpdate) -> None:
        plan = self._plan
        self._same(
            "teacher_text", found, range(plan.teacher_through(update), plan.teacher_through(update + 1))
        )
        if self.most_uses == 1:
            self._same(
                "student_text", found, range(plan.student_through(update), plan.student_through(update + 1))
            )
        else:
            self._sampled(update, found)
        for table, order in self._orders.items():
            for used in found.draws[table]:
                if used.row != (row := order.draw(used.number).index):
                    raise _Wrong(
                        table, used.number, f"select row {row} (update {found.update} used row {used.row})"
                    )

    def _same(self, table: str, found: LedgerUpdate, planned: range) -> None:
        """The draws of a table that is used in order: those of the update, once each."""
        uses = self._once_each(table, found)
        for number in planned:
            if number not in uses:
                raise _Wrong(table, number, f"be used in update {found.update}")
        for number in uses:
            if number not in planned:
                must = f"not be used in update {found.update}, which has the draws {planned.start} to {planned.stop - 1}"
                raise _Wrong(table, number, must)

    def _sampled(self, update: int, found: LedgerUpdate) -> None:
        """The draws of a run that samples from the buffer: any of them, as often as allowed."""
        uses = self._once_each("student_text", found)
        if len(uses) != self._plan.student_groups(update):
            must = f"be {self._plan.student_groups(update)}"
            raise LedgerWrong(f"student draws in update {found.update}", len(uses), must)
        self._uses.update(uses)
        for number in uses:
            if self._uses[number] > self.most_uses:
                must = f"be used at most replay.max_times_sampled={self.most_uses} times"
                raise _Wrong("student_text", number, must)

    @staticmethod
    def _once_each(table: str, found: LedgerUpdate) -> Counter[int]:
        uses = Counter(used.number for used in found.draws[table])
        for number, count in uses.items():
            if count > 1:
                raise _Wrong(table, number, f"be used once in update {found.update}")
        return uses
