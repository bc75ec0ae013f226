"""MLflow: a run of an experiment, found again by a tag."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from deploy.run.tracking.tracker import TrackedRun

TAG = "distill.run_id"
_PARAMETERS_PER_CALL, _METRICS_PER_CALL = 100, 1000
"""A server takes no more in one call."""
_LONGEST_PARAMETER, _LONGEST_TAG = 6000, 5000


class MlflowRun:
    """Logs rows, the settings as parameters of the first start, and texts as tags."""

    def __init__(self, run: TrackedRun) -> None:
        mlflow: Any = import_module("mlflow")
        self._entities: Any = import_module("mlflow.entities")
        experiment = mlflow.set_experiment(run.project).experiment_id
        self._client: Any = mlflow.MlflowClient()
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.run_id}'", max_results=1)
        if found:
            self._id: str = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={TAG: run.run_id}, run_name=run.name).info.run_id
        parameters = [
            self._entities.Param(name, str(value)[:_LONGEST_PARAMETER])
            for name, value in run.settings.items()
        ]
        for part in _parts(parameters, _PARAMETERS_PER_CALL):
            self._client.log_batch(self._id, params=part)

    def log_numbers(self, update: int, numbers: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now_ms, update) for name, value in numbers.items()]
        for part in _parts(metrics, _METRICS_PER_CALL):
            self._client.log_batch(self._id, metrics=part)

    def log_text(self, update: int, name: str, text: str) -> None:
        self._client.set_tag(self._id, f"{name} after update {update}", text[:_LONGEST_TAG])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _parts(things: list[Any], size: int) -> list[list[Any]]:
    return [things[start : start + size] for start in range(0, len(things), size)]
