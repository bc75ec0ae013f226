"""What would make a run faster: the settings to change, and the predicted gain.

The prediction uses the stages' busy shares alone. Let the run have speed 1, and let stage s be busy for a share b_s of
the time with n_s actors. Its actors could then work at the speed 1 / b_s, and m_s actors at m_s / (n_s b_s).

- Stages that overlap: the run is as fast as its slowest stage. While one is busy nearly all the time, the speed with
  m_s actors is max(b) / max(b_s n_s / m_s).
- Stages that take turns (lock-step): an update takes the sum of its parts, so m_s actors save b_s (1 - n_s / m_s) of
  it, and overlap saves all but the largest part.
- Stages that overlap and all wait: at most ``max_policy_age + 1`` updates are under way, so by Little's law the speed
  grows with that number until a stage is busy all the time.

Actors that compute on the cores of one machine cannot together use more cores than there are. An advice never predicts
more than that allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deploy.run.training.clocks import COUNTED_S, REMEDIES, STAGES

WORTH_IT = 1.1
"""Smallest predicted gain that is worth an advice."""
SATURATED = 0.85
"""Busy share from which a stage counts as busy all the time: the rest is the way from one piece of work to the next."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run consists of, as far as an advice depends on it."""

    max_policy_age: int
    num_cores: int | None = None
    """Cores that the actors share; None when each has devices of its own."""
    num_threads: Mapping[str, int] = field(default_factory=dict)
    """Threads of one actor of each stage that computes on the cores."""
    uses_student_text: bool = True
    """Whether the rollout actors do more than to sample for evaluations."""

    @classmethod
    def read(cls, recorded: object) -> Setup | None:
        """The setup that an event of a run folder has, from ``vars`` of one; None if it has another form."""
        if not isinstance(recorded, Mapping) or not isinstance(recorded.get("num_threads"), Mapping):
            return None
        age, cores = recorded.get("max_policy_age"), recorded.get("num_cores")
        threads = recorded["num_threads"]
        numbers = [*([] if cores is None else [cores]), *threads.values()]
        if not isinstance(age, int) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            return None
        student = recorded.get("uses_student_text") is not False
        return cls(max_policy_age=age, num_cores=cores, num_threads=dict(threads), uses_student_text=student)

    def room(self, stage: _Stage, stages: Sequence[_Stage]) -> float:
        """How many more actors of a stage the cores have threads for; infinite for one with devices of its own.

        Stages that take turns may each use every core. Otherwise the engines divide the cores among them.
        """
        threads = self.num_threads.get(stage.name)
        if self.num_cores is None or not threads:
            return math.inf
        engines = [each for each in stages if each.setting is not None]
        beside = [stage] if self.max_policy_age == 0 else engines
        taken = sum(each.num_actors * self.num_threads.get(each.name, 0) for each in beside)
        return max(0, (self.num_cores - taken) // threads)

    def speed_within_cores(self, row: Mapping[str, float]) -> float:
        """How many times as fast the run would be if every core was busy all the time; below 1 if that is slower."""
        busy_cores = sum(
            stage.share * stage.num_actors * self.num_threads.get(stage.name, 0) for stage in _stages(row)
        )
        return self.num_cores / busy_cores if self.num_cores is not None and busy_cores else math.inf


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A change, and how many times as fast the run is predicted to be with it."""

    stage: str
    """The one that limits the run."""
    reason: str
    """The same as a clause, with its busy share."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """The settings to change; empty when no setting helps, and ``otherwise`` says what would."""
    gain: float = 1.0
    otherwise: str = ""

    @property
    def short(self) -> str:
        """The stage and the change, for a line with little room."""
        return f"{self.stage} ({self._settings}: {self.gain:.1f}x)" if self.changes else self.stage

    @property
    def label(self) -> str:
        """The advice without its numbers, which change with every update, as the label of a series."""
        return f"the {self.stage} limits the run; {self._settings or 'no setting would help'}"

    @property
    def _settings(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.changes.items())

    def to_dict(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {"text": self.text, "changes": dict(self.changes), "gain": self.gain}

    @property
    def text(self) -> str:
        """The advice as a clause, for the user."""
        if self.changes:
            return f"{self.reason}; {self._settings} would make it about {self.gain:.1f} times as fast"
        return f"{self.reason}; {self.otherwise}"


@dataclass(frozen=True)
class _Stage:
    name: str
    share: float
    """Busy share of its actors."""
    num_actors: int

    @property
    def setting(self) -> str | None:
        """The size of its pool."""
        return {"rollout": "rollout.replicas", "teacher": "scoring.replicas"}.get(self.name)


def advise(row: Mapping[str, float], setup: Setup | None) -> Advice | None:
    """The change with the largest predicted gain, or what limits the run if no setting would help.

    ``row``: busy shares and numbers of actors by the names of ``metrics.parquet``. ``setup``: None if it is not known,
    and then no gain is predicted.

    Returns None for a row without shares.
    """
    stages = [
        stage for stage in _stages(row) if setup is None or setup.uses_student_text or stage.name != "rollout"
    ]
    if not stages:
        return None
    limit = max(stages, key=lambda stage: stage.share)
    busy = f"busy for {100 * min(1.0, limit.share):.0f} % of the time"
    reason = f"the {limit.name} limits the run ({busy})"
    if setup is None:
        return Advice(
            stage=limit.name, reason=reason, otherwise=f"to move that limit, {REMEDIES[limit.name]}"
        )
    by_cores = setup.speed_within_cores(row)
    if by_cores < WORTH_IT:
        beyond = f"all {setup.num_cores} cores are in use, so only more cores or GPUs would make it faster"
        return Advice(stage=limit.name, reason=reason, otherwise=beyond)
    room = {stage.name: setup.room(stage, stages) for stage in stages}
    if setup.max_policy_age == 0:
        candidates = _in_turns(stages, limit, reason, room, overlaps=setup.uses_student_text)
    elif limit.share < SATURATED and setup.uses_student_text:
        waits = f"no stage is busy all the time (the {limit.name} most, {100 * limit.share:.0f} %): they wait for weights"
        candidates = _waiting(setup.max_policy_age, limit, waits)
    else:
        candidates = _larger_pools(stages, limit, reason, room)
    best = max(candidates, key=lambda each: each.gain, default=None)
    if best is not None and min(best.gain, by_cores) >= WORTH_IT:
        return replace(best, gain=min(best.gain, by_cores))
    return Advice(stage=limit.name, reason=reason, otherwise=_beyond_settings(stages, limit))


def _stages(row: Mapping[str, float]) -> list[_Stage]:
    return [
        _Stage(name, row[f"{name}/busy_share"], round(row.get(actors, 1.0)) if actors else 1)
        for name, (_, actors) in STAGES.items()
        if row.get(f"{name}/busy_share", 0.0) > 0
    ]


def _in_turns(
    stages: Sequence[_Stage], limit: _Stage, reason: str, room: Mapping[str, float], *, overlaps: bool
) -> Iterator[Advice]:
    """Twice the actors of one stage, or overlap. ``room``: more actors that each stage can have."""
    for stage in stages:
        if stage.setting is not None and stage.num_actors <= room[stage.name]:
            gain = 1 / (1 - min(stage.share, 1.0) / 2)
            yield Advice(
                stage=limit.name, reason=reason, changes={stage.setting: 2 * stage.num_actors}, gain=gain
            )
    if not overlaps:
        return
    overlap = 1 / min(limit.share, 1.0)
    age = max(1, math.ceil(overlap) - 1)
    yield Advice(
        stage=limit.name,
        reason=f"the stages take turns, and {reason}",
        changes={"replay.max_policy_age": age},
        gain=overlap,
    )


def _waiting(max_policy_age: int, limit: _Stage, reason: str) -> Iterator[Advice]:
    """More updates under way, at most twice as many."""
    under_way = max_policy_age + 1
    wanted = min(2 * under_way, math.ceil(under_way / limit.share))
    gain = min(wanted / under_way, 1 / limit.share)
    yield Advice(stage=limit.name, reason=reason, changes={"replay.max_policy_age": wanted - 1}, gain=gain)


def _larger_pools(
    stages: Sequence[_Stage], limit: _Stage, reason: str, room: Mapping[str, float]
) -> Iterator[Advice]:
    """The smallest pools that are as fast as the learner, or twice as fast as they are now, within their room."""
    fixed = [stage.share for stage in stages if stage.setting is None]
    faster = min([2.0, *(limit.share / share for share in fixed)])
    changes: dict[str, int] = {}
    shares = fixed
    for stage in stages:
        if stage.setting is not None:
            needed = math.ceil(stage.num_actors * faster * stage.share / limit.share - 1e-6)
            needed = int(min(max(needed, stage.num_actors), stage.num_actors + room[stage.name]))
            if needed > stage.num_actors:
                changes[stage.setting] = needed
            shares = [*shares, stage.share * stage.num_actors / needed]
    if changes:
        yield Advice(stage=limit.name, reason=reason, changes=changes, gain=limit.share / max(shares))


def _beyond_settings(stages: Sequence[_Stage], limit: _Stage) -> str:
    """What would help where no pool does."""
    if limit.setting is not None:
        return "no setting is known that would make it much faster"
    others = max((stage.share for stage in stages if stage is not limit), default=0.0)
    bound = f" up to {limit.share / others:.1f} times as fast" if others > 0 else " faster"
    return f"a GPU or more cores for the learner could make it{bound}"


def mean_row(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean busy shares of some rows, weighted with the seconds that they count, and the newest numbers of actors."""
    mean: dict[str, float] = {}
    for name, (_, actors) in STAGES.items():
        column = f"{name}/busy_share"
        weighed = [(row[column], row.get(COUNTED_S, 1.0)) for row in rows if column in row]
        if total := sum(seconds for _, seconds in weighed):
            mean[column] = sum(share * seconds for share, seconds in weighed) / total
        if actors is not None and (counts := [row[actors] for row in rows if actors in row]):
            mean[actors] = counts[-1]
    return mean
