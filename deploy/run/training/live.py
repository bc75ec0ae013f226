"""The live line of a training, from the facts that the driver's loop reports."""

from __future__ import annotations

from typing import Any

from deploy.run.progress import Progress, training_line
from deploy.run.rates import Rates
from deploy.run.training.advice import advise, mean_row


class LiveTraining:
    """Keeps the newest facts, and shows them on request."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._facts: dict[str, Any] = {}
        self._rates = Rates()
        self._shown: set[str] = set()

    @property
    def facts(self) -> dict[str, Any]:
        """The newest facts by name."""
        return self._facts

    def report(self, **facts: Any) -> None:
        """Take facts by name."""
        self._facts |= facts

    def show(self) -> None:
        """Update the live line, and print each alarm once."""
        for alarm in self._facts.get("alarms", ()):
            if alarm not in self._shown:
                self._progress.say(f"warning: {alarm}")
                self._shown.add(alarm)
        self._rates.observe(self._facts)
        facts = self._facts | self._rates.outlook()
        if advice := advise(mean_row(self._rates.rows), self._facts.get("setup")):
            facts["limit"] = advice.short
        self._progress.show(training_line(facts, self._rates.tokens_per_s()))
