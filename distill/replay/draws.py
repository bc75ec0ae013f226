"""The data order: which row a draw selects, and which draws an update uses.

Both are pure functions of the settings, the seed and a number, so a checkpoint stores numbers and no
random state. Called by the replay index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from distill.config import RunConfig
from distill.errors import ConfigError
from distill.interfaces import Draw, Table


class Purpose(IntEnum):
    """What a random number is for: distinguishes the generators of one seed."""

    STUDENT_ORDER = 0
    TEACHER_ORDER = 1
    MIXED_COIN = 2
    SAMPLER = 3


def seeded_generator(seed: int, purpose: Purpose, number: int) -> np.random.Generator:
    """Return the generator of (seed, purpose, number)."""
    return np.random.default_rng([seed, purpose, number])


class DrawOrder:
    """Draws of one table: every epoch is a permutation of its rows, seeded by (seed, table, epoch)."""

    def __init__(self, table: Table, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ConfigError(
                f"rows of the {table} table", num_rows, "be >= 1", "use a data set with more rows"
            )
        self.table: Table = table
        self.num_rows = num_rows
        self.seed = seed
        self.first_issue = 0
        """The issue of a draw that is issued for the first time."""
        self._permutations: dict[int, np.ndarray] = {}

    def draw(self, number: int) -> Draw:
        """Return draw ``number`` of the table, counted from 0."""
        epoch, place = divmod(number, self.num_rows)
        index = int(self._permutation(epoch)[place])
        return Draw(table=self.table, number=number, epoch=epoch, index=index, issue=self.first_issue)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # Draws move forward, so two epochs are enough around a boundary.
            while len(self._permutations) >= 2:
                del self._permutations[next(iter(self._permutations))]
            purpose = Purpose.STUDENT_ORDER if self.table == "student_text" else Purpose.TEACHER_ORDER
            generator = seeded_generator(self.seed, purpose, epoch)
            self._permutations[epoch] = generator.permutation(self.num_rows)
        return self._permutations[epoch]


@dataclass(kw_only=True)
class BatchPlan:
    """How many student groups and teacher rows each update uses."""

    shares: list[tuple[int, float]]
    """Entries (first update, share): from that update on, the probability that an update uses student groups."""
    may_use_student: bool
    """Whether some update uses student groups, or can after a later :meth:`set_share`."""
    both_texts: bool
    """Whether an update with student groups uses teacher rows as well."""
    prompts_per_update: int
    teacher_rows_per_update: int
    """0 for a recipe without teacher text."""
    seed: int
    _student_updates: list[int] = field(default_factory=lambda: [0], init=False, repr=False)
    """Entry u: the number of updates before u that use student groups. Computed on demand."""

    @staticmethod
    def of(config: RunConfig) -> BatchPlan:
        """Return the plan of a valid configuration."""
        recipe, learner = config.recipe, config.learner
        shares = {"none": 0.0, "every_update": 1.0, "mixed": recipe.student_fraction}
        share = shares[recipe.student_text]
        return BatchPlan(
            shares=[(0, share)],
            may_use_student=share > 0 or recipe.adapts_fraction,
            both_texts=recipe.student_text == "every_update",
            prompts_per_update=learner.prompts_per_update,
            teacher_rows_per_update=0 if recipe.teacher_text == "none" else learner.teacher_rows_per_update,
            seed=config.seed,
        )

    def student_groups(self, update: int) -> int:
        """Return the number of student groups that ``update`` uses."""
        return self.student_through(update + 1) - self.student_through(update)

    def student_through(self, updates: int) -> int:
        """Return the number of student groups that the first ``updates`` updates use."""
        return self._student_updates_before(updates) * self.prompts_per_update

    def teacher_through(self, updates: int) -> int:
        """Return the number of teacher rows that the first ``updates`` updates use."""
        teacher_updates = updates if self.both_texts else updates - self._student_updates_before(updates)
        return teacher_updates * self.teacher_rows_per_update

    def set_share(self, from_update: int, share: float) -> None:
        """Change the share from this update on. No draw of it or a later update may be in flight."""
        self.shares = [entry for entry in self.shares if entry[0] < from_update] + [(from_update, share)]
        del self._student_updates[from_update + 1 :]

    def load_shares(self, shares: list[tuple[int, float]]) -> None:
        """Restore the shares of a checkpoint."""
        self.shares = shares
        del self._student_updates[1:]

    def _share(self, update: int) -> float:
        return next(share for first, share in reversed(self.shares) if first <= update)

    def _student_updates_before(self, update: int) -> int:
        counts = self._student_updates
        counts.extend(self._counts_from(len(counts) - 1, update))
        return counts[update]

    def _counts_from(self, first: int, end: int) -> Iterator[int]:
        count = self._student_updates[-1]
        for update in range(first, end):
            count += seeded_generator(self.seed, Purpose.MIXED_COIN, update).random() < self._share(update)
            yield count
