"""Counts the rows of a data set that break a rule, so that one error tells the user of all of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from distill.errors import ConfigError

_MOST_RULES = 3
"""Rules that the error names."""
_DETAILS = re.compile(r"\s*(?:[:;,(]| but | not | as other ).*", re.DOTALL)
"""What follows a rule and differs from row to row."""


@dataclass
class Rejections:
    """The rows that were refused so far."""

    first: ConfigError | None = None
    num_rows: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    """Rule, without the details of a row -> number of rows that break it."""

    def add(self, error: ConfigError) -> None:
        self.first = self.first or error
        self.num_rows += 1
        self.rules[_DETAILS.sub("", error.must)] += 1

    def require_none(self, num_read: int) -> None:
        """Raise the error of the first row, with the numbers of all, unless every row was accepted.

        ``num_read``: rows that were read, the refused ones included.

        Raises: ConfigError.
        """
        if self.first is None:
            return
        if self.num_rows == 1:
            raise self.first
        named = [f"{count} must {rule}" for rule, count in self.rules.most_common(_MOST_RULES)]
        others = self.num_rows - sum(count for _, count in self.rules.most_common(_MOST_RULES))
        if others:
            named.append(f"{others} break other rules")
        counted = f"{self.num_rows} of {num_read} rows are refused ({', '.join(named)})"
        first = self.first
        remedy = f"{first.remedy}; {counted}" if first.remedy else counted
        raise type(first)(first.name, first.value, first.must, remedy)
