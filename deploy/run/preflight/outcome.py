"""The outcome of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.errors import ConfigError

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    status: Status
    message: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """The message, with the remedy if there is one."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


def failed(name: str, error: ConfigError) -> Check:
    """The outcome of a check that raised ``error``."""
    return Check(name, "fail", error.statement, error.remedy)
