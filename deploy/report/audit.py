"""`distill audit`: whether every draw of a run was used as planned, none skipped and none too often.

The plan follows from the configuration, so what the run did (``ledger.jsonl``) is compared with what it had to do: the
order of the draws, the rows that they select, and how many each update uses. What a return to a checkpoint has undone
does not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.config import RunConfig
from distill.errors import ConfigError, DistillError
from distill.interfaces import Table
from distill.replay.draws import BatchPlan, DrawOrder
from distill.run.folder import RunFolder
from distill.run.ledger_file import TABLES, LedgerReader, LedgerStart, LedgerUpdate, Used


class LedgerWrong(DistillError, RuntimeError):
    """A run that did not use its draws as planned."""

    code = "ledger"


@dataclass
class Audit:
    """What the ledger of a run says."""

    num_updates: int = 0
    """Updates in the lineage that survives."""
    num_starts: int = 0
    num_undone: int = 0
    """Updates that were made again."""
    num_broken: int = 0
    """Lines that could not be read."""
    trained: dict[str, int] = field(default_factory=dict)
    """Draws that were used in the lineage that survives, by table."""
    reissued: dict[str, int] = field(default_factory=dict)
    """Those of them that had been issued before, by table."""


@dataclass
class _Lineage:
    """The updates that survive, with everything that was ever said of a draw."""

    updates: dict[int, LedgerUpdate] = field(default_factory=dict)
    starts: list[LedgerStart] = field(default_factory=list)
    num_undone: int = 0
    histories: dict[tuple[str, int], list[str]] = field(default_factory=dict)

    def read(self, reader: LedgerReader) -> None:
        for entry in reader:
            if isinstance(entry, LedgerStart):
                self.starts.append(entry)
                undone = [update for update in self.updates if update > entry.updates_done]
                for update in undone:
                    for table, used in self._draws(self.updates.pop(update)):
                        self._note(
                            table,
                            used.number,
                            f"update {update} undone by a return to update {entry.updates_done}",
                        )
                self.num_undone += len(undone)
            else:
                if entry.update in self.updates:
                    raise LedgerWrong(
                        "update",
                        entry.update,
                        "be in the ledger once, unless a return to a checkpoint undid it",
                    )
                self.updates[entry.update] = entry
                for table, used in self._draws(entry):
                    self._note(
                        table,
                        used.number,
                        f"used in update {entry.update} (row {used.row}, issue {used.issue})",
                    )

    def _note(self, table: str, number: int, text: str) -> None:
        incarnation = self.starts[-1].incarnation if self.starts else 0
        self.histories.setdefault((table, number), []).append(f"{text}, in start {incarnation}")

    @staticmethod
    def _draws(update: LedgerUpdate) -> Iterator[tuple[str, Used]]:
        for table in TABLES:
            for used in update.draws[table]:
                yield table, used


def audit(folder: RunFolder, config: RunConfig, ledger: Mapping[str, Any] | None) -> Audit:
    """Compare the ledger of a run with its plan.

    ``ledger``: the part of the newest checkpoint's state that the replay made, for a recipe that adapts its share of
    student text: the shares are there, and later updates, which can have others, are not checked.

    Raises: ConfigError without a ledger; LedgerWrong with the first draw that was not used as planned, and its history.
    """
    reader = LedgerReader(folder.ledger)
    lineage = _Lineage()
    try:
        lineage.read(reader)
    except OSError as error:
        must = f"be readable ({error.strerror})"
        raise ConfigError("ledger", folder.ledger, must, "audit a run that has trained") from error
    plan = BatchPlan.of(config)
    if ledger is not None:
        plan.load_shares([(int(first), float(share)) for first, share in ledger["student_shares"]])
        through = int(ledger["updates_done"])
        lineage.updates = {number: each for number, each in lineage.updates.items() if number <= through}
    _Check(config, plan, lineage).run()
    updates = lineage.updates.values()
    return Audit(
        num_updates=len(lineage.updates),
        num_starts=len(lineage.starts),
        num_undone=lineage.num_undone,
        num_broken=reader.num_broken,
        trained={table: sum(len(each.draws[table]) for each in updates) for table in TABLES},
        reissued={
            table: sum(used.issue > 0 for each in updates for used in each.draws[table]) for table in TABLES
        },
    )


class _Check:
    """Compares a lineage with the plan, update by update."""

    def __init__(self, config: RunConfig, plan: BatchPlan, lineage: _Lineage) -> None:
        self._config = config
        self._plan = plan
        self._lineage = lineage
        self._orders: dict[str, DrawOrder] = {}
        if lineage.starts:
            rows = lineage.starts[-1].rows
            tables: tuple[Table, ...] = ("student_text", "teacher_text")
            self._orders = {
                table: DrawOrder(table, rows[table], config.seed) for table in tables if rows[table]
            }
        self._uses: Counter[int] = Counter()

    def run(self) -> None:
        made = sorted(self._lineage.updates)
        if made != list(range(1, len(made) + 1)):
            missing = next(update for update in range(1, made[-1]) if update not in self._lineage.updates)
            raise LedgerWrong("update", missing, f"be in the ledger, because update {made[-1]} is")
        for update in made:
            self._check(update - 1, self._lineage.updates[update])

    def _check(self, update: int, found: LedgerUpdate) -> None:
        plan = self._plan
        self._same(
            "teacher_text", found, range(plan.teacher_through(update), plan.teacher_through(update + 1))
        )
        if self._config.replay.lock_step or self._config.replay.max_times_sampled == 1:
            self._same(
                "student_text", found, range(plan.student_through(update), plan.student_through(update + 1))
            )
        else:
            self._sampled(update, found)
        for table, order in self._orders.items():
            for used in found.draws[table]:
                if used.row != (row := order.draw(used.number).index):
                    self._wrong(
                        table, used.number, f"select row {row} (update {found.update} used row {used.row})"
                    )

    def _same(self, table: str, found: LedgerUpdate, planned: range) -> None:
        numbers = [used.number for used in found.draws[table]]
        for number in planned:
            if number not in numbers:
                self._wrong(table, number, f"be used in update {found.update}")
        for place, number in enumerate(numbers):
            if number not in planned:
                self._wrong(
                    table,
                    number,
                    f"not be used in update {found.update}, which has the draws {planned.start} to {planned.stop - 1}",
                )
            if number in numbers[:place]:
                self._wrong(table, number, f"be used once in update {found.update}")

    def _sampled(self, update: int, found: LedgerUpdate) -> None:
        """The draws of a recipe that samples from the buffer: any of them, as often as allowed."""
        numbers = [used.number for used in found.draws["student_text"]]
        if len(numbers) != self._plan.student_groups(update):
            must = f"be {self._plan.student_groups(update)}"
            raise LedgerWrong(f"student draws in update {found.update}", len(numbers), must)
        for number, count in Counter(numbers).items():
            if count > 1:
                self._wrong("student_text", number, f"be used once in update {found.update}")
            self._uses[number] += 1
            most = self._config.replay.max_times_sampled
            if self._uses[number] > most:
                self._wrong("student_text", number, f"be used at most replay.max_times_sampled={most} times")

    def _wrong(self, table: str, number: int, must: str) -> None:
        history = self._lineage.histories.get((table, number), ["never used"])
        raise LedgerWrong(f"draw {number} of {table}", "; ".join(history), must)
