"""Weights & Biases, MLflow and Trackio themselves, without a server: each finds every number of a run in what it stored."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from distill.config import RunConfig, TrackingConfig
from distill.run.folder import RunFolder
from distill.run.metrics import read_events
from tests.unit.tracking.builders import expected_numbers, interrupted_and_resumed

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries
FIRST_PART, SECOND_PART = range(1, 6), range(4, 8)
"""Updates before and after the run was resumed; these trackers keep both."""
Numbers = Mapping[str, Mapping[int, float]]


def installed(package: str) -> Any:
    return pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")


def tracked(path: Path, tracker: str) -> RunFolder:
    """A run that was interrupted and resumed, and whose tracker has not failed."""
    said: list[str] = []
    config = RunConfig(tracking=TrackingConfig(to=[tracker], project="tests"))
    folder = interrupted_and_resumed(path / "run", config, said.append)
    assert said == []
    assert [event["tracker"] for event in read_events(folder.path) if event["event"] == "tracker_closed"] == [
        tracker,
        tracker,
    ]
    return folder


def assert_complete(newest: Numbers, folder: RunFolder) -> None:
    """``newest``: the value that was stored last, by name and update."""
    expected = expected_numbers(folder)
    assert set(expected["learner/loss"]) == set(range(1, 8)) and len(expected) > 20
    assert {name: dict(values) for name, values in newest.items()} == expected


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = installed("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = tracked(tmp_path, "mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])  # the resumed run is the same
    assert run.info.run_name == f"ammd-{folder.run_id}" and run.info.status == "FINISHED"
    assert run.data.params["learner.num_updates"] == "20" and run.data.params["tracking.to"] == "['mlflow']"
    assert run.data.tags["alarm after update 7"] == "the critic is too weak"
    newest: dict[str, dict[int, float]] = {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        newest[name] = {point.step: point.value for point in sorted(history, key=lambda each: each.timestamp)}
    assert_complete(newest, folder)
    losses = [point.step for point in client.get_metric_history(run.info.run_id, "learner/loss")]
    assert sorted(losses) == sorted([*FIRST_PART, *SECOND_PART])


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    folder = tracked(tmp_path, "wandb")
    newest: dict[str, dict[int, float]] = {}
    starts = sorted((folder.path / "wandb").glob(f"offline-run-*/run-{folder.run_id}.wandb"))
    assert len(starts) == 2
    for path in starts:
        for row in wandb_rows(path):
            for name, value in row.items():
                if not name.startswith("_") and name != "update":
                    newest.setdefault(name, {})[int(row["update"])] = value
    assert_complete(newest, folder)


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, Any]] = []
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
    return rows


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, behind the seven bytes that W&B puts first."""
    place, record = 7, b""
    while place + 7 <= len(log):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", log, place + 4)
        record += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield record
            record = b""


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    trackio = installed("trackio")
    folder = tracked(tmp_path, "trackio")
    (run,) = trackio.Api().runs("tests")
    assert run.name == f"ammd-{folder.run_id}"
    newest: dict[str, dict[int, float]] = {}
    for row in import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("tests", run.name):
        for name in row.keys() - {"step", "timestamp"}:
            newest.setdefault(name, {})[row["step"]] = row[name]
    assert_complete(newest, folder)
