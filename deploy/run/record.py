"""What a run measures of itself, from its first stage to ``summary.json``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deploy.run.training.advice import Advice
from deploy.version import recorded_versions
from distill.config import RunConfig
from distill.evaluation import load_evaluation
from distill.run.folder import RunFolder
from distill.run.metrics import EventLog

PAGE = "report.html"
"""The report of a run in its folder. It is no part of the method, so ``RunFolder`` does not know it."""
_COUNTERS = {
    "learner": ("learner", "learner/num_input_tokens", "timing/learner_total_busy_s"),
    "rollout": ("rollout", "rollout/num_tokens", "timing/rollout_busy_s"),
    "teacher": ("teacher_scored", "teacher/num_tokens", "timing/teacher_busy_s"),
    "proxy": ("proxy_scored", "teacher/num_tokens", "timing/teacher_busy_s"),
}
"""Per role: the name of its tokens in the summary, and the counters of its tokens and of its busy seconds."""


class RunRecord:
    """Times, tokens and memory of one incarnation. Stages fill it in; :meth:`finish` writes the summary."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config = config
        self.folder = folder
        self.timing_s: dict[str, float] = {}
        """By stage, and by what an actor was busy with."""
        self.tokens: dict[str, float] = {}
        """By stage or actor."""
        self.updates = self.policy_version = 0
        self.proxy_training_s: float | None = None
        """Of the proxy in use, in whichever run trained it."""
        self.peak_pss_bytes: dict[str, int] = {}
        """By role."""
        self.limit: dict[str, Any] | None = None
        self.advice: dict[str, Any] | None = None
        self.actors: dict[str, dict[str, float]] = {}
        """The counters of every actor of the last stage, by its name."""
        self._events = EventLog(folder.path)
        self._start = time.monotonic()
        self._events.write("started", incarnation=folder.incarnation, versions=recorded_versions())

    def event(self, name: str, **fields: object) -> None:
        """Record an event of the run."""
        self._events.write(name, **fields)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record the duration of a stage, and its start and end as events."""
        start = time.monotonic()
        self._events.write("stage_started", stage=stage)
        yield
        self.timing_s[stage] = time.monotonic() - start
        self._events.write("stage_finished", stage=stage, seconds=self.timing_s[stage])

    def training(
        self,
        *,
        updates: int,
        policy_version: int,
        timing_s: Mapping[str, float],
        limit: object,
        advice: Advice | None,
        actors: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Record the last stage. ``actors``: the counters of every actor, which are added up by role; one that failed at once
        has none. ``limit``: the stage that limited it, a dataclass or None. ``advice``: what would make it faster."""
        self.limit = vars(limit) if limit is not None else None
        self.advice = advice.to_dict() if advice is not None else None
        self.updates, self.policy_version = updates, policy_version
        self.timing_s |= timing_s
        self.actors = {name: dict(counters) for name, counters in actors.items()}
        for name, counters in actors.items():
            role = name.partition("-")[0]
            shown, tokens, busy = _COUNTERS[role]
            self.tokens[shown] = self.tokens.get(shown, 0.0) + counters.get(tokens, 0.0)
            self.timing_s[f"{role}_busy"] = self.timing_s.get(f"{role}_busy", 0.0) + counters.get(busy, 0.0)

    def finish(self) -> dict[str, Any]:
        """Write and return the summary."""
        before, after = (load_evaluation(self.folder.evaluation(label)) for label in ("before", "after"))
        summary = {
            "updates": self.updates,
            "policy_version": self.policy_version,
            "recipe": self.config.recipe.name,
            "engine": self.config.rollout.engine,
            "before": before.to_dict(),
            "after": after.to_dict(),
            "best": self.folder.read_best(),
            "timing_s": {name: round(seconds, 2) for name, seconds in self.timing_s.items()},
            "proxy_training_s": self.proxy_training_s,
            "tokens": {name: int(count) for name, count in self.tokens.items()},
            "limit": self.limit,
            "advice": self.advice,
            "actors": self.actors,
            "peak_pss_bytes": self.peak_pss_bytes,
            "wall_s": round(time.monotonic() - self._start, 2),
            "incarnations": self.folder.incarnation,
        }
        self.folder.write_summary(summary)
        self._events.write("finished", updates=self.updates)
        return summary


def remove_results(folder: RunFolder) -> None:
    """Remove what a run wrote at its end, its report included, because it continues to a later one."""
    folder.remove_results()
    (folder.path / PAGE).unlink(missing_ok=True)
