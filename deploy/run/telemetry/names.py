"""The names under which a run's numbers are in Prometheus: one definition for the exporter and the dashboards.

Ray's agent on each node publishes what its processes set, and adds the prefix ``ray_`` to each name and ``_total`` to
that of a counter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from deploy.run.training.clocks import STAGES

_PREFIX = "distill_"


@dataclass(frozen=True)
class Exported:
    """A number that a run exports beside the columns of ``metrics.parquet``."""

    name: str
    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    """Beside ``run_id``, which all have."""
    description: str

    @property
    def in_prometheus(self) -> str:
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


_ACTOR = ("role", "member")
ACTOR_SECONDS = Exported(
    "distill_actor_seconds",
    "counter",
    (*_ACTOR, "state"),
    "Seconds of an actor by state: busy, storing, starved or blocked.",
)
ACTOR_TOKENS = Exported(
    "distill_actor_tokens", "counter", _ACTOR, "Tokens that an actor has written or scored."
)
LIMITS = Exported(
    "distill_limits", "gauge", ("stage",), "1 for the stage that limits the run, 0 for the others."
)
ADVICE = Exported(
    "distill_advice",
    "gauge",
    ("advice",),
    "How many times as fast the run is predicted to be after the change that the label names; 0 for what held before.",
)
UPDATE = Exported("distill_update", "gauge", (), "Updates done.")
ALARMS = Exported("distill_alarms", "gauge", (), "Alarms that the run has raised.")
MEMORY = Exported(
    "distill_memory_bytes", "gauge", ("process",), "Memory of a role's processes (proportional set size)."
)
FREE = Exported(
    "distill_free_bytes", "gauge", ("medium",), "Free bytes on the run folder's disk and in shared memory."
)
EXPORTED = (ACTOR_SECONDS, ACTOR_TOKENS, LIMITS, ADVICE, UPDATE, ALARMS, MEMORY, FREE)

ACTOR_STATES = {
    "timing/rollout_busy_s": "busy",
    "timing/rollout_storing_s": "storing",
    "timing/rollout_blocked_s": "blocked",
    "timing/teacher_busy_s": "busy",
    "timing/teacher_storing_s": "storing",
    "timing/teacher_starved_s": "starved",
    "timing/learner_total_busy_s": "busy",
    "timing/learner_starved_s": "starved",
}
"""An actor's counter of seconds -> its state."""
ACTOR_TOKEN_COUNTERS = ("rollout/num_tokens", "teacher/num_tokens", "learner/num_input_tokens")
LIMIT_STAGES = tuple(STAGES)


_ROLES = {"critic": "learner", "policy": "learner", "weights": "learner", "timing": "driver"}


def role_of(column: str) -> str:
    """The role that a column of ``metrics.parquet`` is about."""
    part = column.partition("/")[0]
    return _ROLES.get(part, part)


def of_column(column: str) -> str:
    """The name that a column of ``metrics.parquet`` is exported under, as a gauge with the labels ``run_id`` and ``role``."""
    return _PREFIX + re.sub(r"[^a-z0-9]+", "_", column)
