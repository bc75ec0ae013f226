"""Exports the numbers of a run while it trains. The caller ends the export, and not the run, when something fails."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from deploy.run.telemetry import names
from deploy.run.telemetry.names import Exported
from deploy.run.training.advice import advise
from deploy.run.training.clocks import limit_of

EXPORT_EVERY_S = 5.0
"""Prometheus looks as often. An update can take minutes, and actors work meanwhile."""


class Meter(Protocol):
    """Takes numbers by name."""

    def set(self, name: str, description: str, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge."""
        ...

    def add(self, name: str, description: str, amount: float, labels: Mapping[str, str]) -> None:
        """Raise a counter by an amount that is not negative."""
        ...


class RayMeter:
    """Numbers that Ray's agent on this node publishes for Prometheus."""

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}

    def set(self, name: str, description: str, value: float, labels: Mapping[str, str]) -> None:
        from ray.util.metrics import Gauge

        self._instrument(Gauge, name, description, labels).set(value, tags=dict(labels))

    def add(self, name: str, description: str, amount: float, labels: Mapping[str, str]) -> None:
        from ray.util.metrics import Counter

        if amount > 0:  # Ray refuses 0
            self._instrument(Counter, name, description, labels).inc(amount, tags=dict(labels))

    def _instrument(self, kind: Any, name: str, description: str, labels: Mapping[str, str]) -> Any:
        if name not in self._instruments:
            self._instruments[name] = kind(name, description=description, tag_keys=tuple(labels))
        return self._instruments[name]


class Exporter:
    """Exports a run's rows and its actors' counters to a meter."""

    def __init__(self, meter: Meter, run_id: str) -> None:
        self._meter = meter
        self._run_id = run_id
        self._counted: dict[tuple[str, ...], float] = {}
        self._row: Mapping[str, float] | None = None
        self._advice: str | None = None

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Export the newest facts of the driver's loop: the row of an update once, and the alarms."""
        self._gauge(names.ALARMS, len(facts.get("alarms", ())))
        row = facts.get("row")
        if row is None or row is self._row:
            return
        self._row = row
        self._gauge(names.UPDATE, facts.get("update", 0))
        for column, value in row.items():
            if value is not None:
                self._meter.set(
                    names.of_column(column),
                    f"{column} of metrics.parquet.",
                    float(value),
                    {"run_id": self._run_id, "role": names.role_of(column)},
                )
        if (advice := advise(row, facts.get("setup"))) is not None:
            if self._advice not in (None, advice.label):
                self._gauge(names.ADVICE, 0.0, advice=str(self._advice))
            self._advice = advice.label
            self._gauge(names.ADVICE, advice.gain, advice=advice.label)
        limit = limit_of(row)
        for stage in names.LIMIT_STAGES:
            self._gauge(names.LIMITS, float(limit is not None and limit.stage == stage), stage=stage)

    def actors(self, counters: Mapping[str, Mapping[str, float]]) -> None:
        """Export the counters of actors, by the actor's name. A counter that has fallen starts again."""
        for member, stats in counters.items():
            actor = {"role": member.partition("-")[0], "member": member}
            for name, value in stats.items():
                if name in names.ACTOR_STATES:
                    self._count(names.ACTOR_SECONDS, value, **actor, state=names.ACTOR_STATES[name])
                if name in names.ACTOR_TOKEN_COUNTERS:
                    self._count(names.ACTOR_TOKENS, value, **actor)

    def machine(self, memory: Mapping[str, int], folder: Path, shared: Path) -> None:
        """Export memory by role, and what is free on the media that a run fills."""
        for process, num_bytes in memory.items():
            self._gauge(names.MEMORY, num_bytes, process=process)
        for medium, path in (("run folder", folder), ("shared memory", shared)):
            with suppress(OSError):
                self._gauge(names.FREE, shutil.disk_usage(path).free, medium=medium)

    def _gauge(self, metric: Exported, value: float, **labels: str) -> None:
        self._meter.set(metric.name, metric.description, value, {"run_id": self._run_id, **labels})

    def _count(self, metric: Exported, value: float, **labels: str) -> None:
        key = (metric.name, *labels.values())
        before = self._counted.get(key, 0.0)
        self._counted[key] = value
        amount = value - before if value >= before else value
        self._meter.add(metric.name, metric.description, amount, {"run_id": self._run_id, **labels})


async def export_repeatedly(
    exporter: Exporter,
    facts: Callable[[], Mapping[str, Any]],
    counters: Callable[[], Awaitable[Mapping[str, Mapping[str, float]]]],
    memory: Callable[[], Mapping[str, int]],
    folder: Path,
    shared: Path,
) -> None:
    """Export every few seconds until cancelled."""
    while True:
        exporter.facts(facts())
        exporter.machine(memory(), folder, shared)
        exporter.actors(await counters())
        await asyncio.sleep(EXPORT_EVERY_S)
