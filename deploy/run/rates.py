"""Tokens per second of each actor and the time left, from the learner's last rows of metrics."""

from __future__ import annotations

from typing import Any

_COUNTERS = {"rollout": "rollout/num_tokens", "teacher": "teacher/num_tokens"}


class Rates:
    """Rates over the last ``window`` updates."""

    def __init__(self, window: int = 5) -> None:
        self.window = window
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._num_updates = 0

    def observe(self, facts: dict[str, Any]) -> None:
        """Take the facts that the learner reports; a repeated update changes nothing."""
        update, row = facts.get("update"), facts.get("row")
        self._num_updates = facts.get("num_updates", 0)
        if update is None or row is None or (self._rows and self._rows[-1][0] == update):
            return
        self._rows = [*self._rows, (update, row)][-self.window - 1 :]

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows of the last updates."""
        return self._recent()

    def tokens_per_s(self) -> dict[str, float]:
        """Tokens per second of the whole loop, so that the actors' numbers can be compared."""
        if not self._rows:
            return {}
        seconds = self._seconds()
        rates = {}
        for stage, name in _COUNTERS.items():
            counts = [row[name] for _, row in self._rows if name in row]
            if len(counts) >= 2 and seconds > 0:
                rates[stage] = (counts[-1] - counts[0]) / seconds
        tokens = sum(
            row.get("policy/teacher_text.num_tokens", 0) + row.get("policy/student_text.num_tokens", 0)
            for row in self._recent()
        )
        if seconds > 0:
            rates["learner"] = tokens / seconds
        return rates

    def outlook(self) -> dict[str, float]:
        """Return ``eta_s``: the seconds left at the pace of the last updates, without evaluations."""
        if not self._rows:
            return {}
        recent = self._recent()
        pace = sum(row["timing/update_s"] for row in recent) / len(recent)
        return {"eta_s": pace * (self._num_updates - self._rows[-1][0])}

    def _recent(self) -> list[dict[str, float]]:
        rows = [row for _, row in self._rows]
        return rows[1:] or rows

    def _seconds(self) -> float:
        return sum(row["timing/update_s"] for row in self._recent())
