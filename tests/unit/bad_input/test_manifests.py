"""The small files beside a run's data: its identity, counters, results, tables, indexes of weights and pushes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from deploy.report.run_files import read_run
from deploy.run.tensor_files import INDEX, stored_tensors
from distill.data import read_table
from distill.data.tables import write_table
from distill.errors import ConfigError
from distill.evaluation import load_evaluation
from distill.interfaces import WeightManifest, WeightPushError
from distill.run.folder import RunFolder
from distill.run.metrics import read_metrics
from distill.run.policy_version import PolicyVersionCounter
from distill.weights import verify_once, write_weights
from tests.unit.bad_input.outcome import cases, outcome_of
from tests.unit.bad_input.test_checkpoints import JSON

CONTENT = st.one_of(
    st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()), st.just(b"[" * 100_000), st.just(b'{"a": 1}')
)  # fmt: skip
READERS: dict[str, Callable[[Path], Any]] = {
    "run.json": lambda folder: RunFolder(folder).run_id,
    "policy_version.json": lambda folder: PolicyVersionCounter(folder).next(),
    "summary.json": lambda folder: RunFolder(folder).read_summary(),
    "failure.json": lambda folder: RunFolder(folder).read_failure(),
    "best.json": lambda folder: RunFolder(folder).read_best(),
    "metrics.parquet": read_metrics,
    "after.parquet": lambda folder: load_evaluation(folder / "after.parquet"),
}


@pytest.mark.parametrize("name", READERS)
@cases(40)
@given(content=CONTENT)
def test_files_of_a_run_folder(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    outcome = outcome_of(lambda: READERS[name](tmp_path))
    assert outcome.error is None or (isinstance(outcome.error, ConfigError) and outcome.error.remedy)
    if name == "policy_version.json" and outcome.accepted is not None:
        assert outcome.accepted == json.loads(content)["policy_version"] + 1


@cases(60)
@given(st.dictionaries(st.sampled_from(["run.json", "settings.json", "config.yaml", "summary.json", "best.json", "failure.json", "metrics.parquet", "events.jsonl"]), CONTENT, min_size=1))  # fmt: skip
def test_a_report_names_what_it_cannot_read(tmp_path: Path, files: dict[str, bytes]):
    for path in tmp_path.iterdir():
        path.unlink()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    outcome = outcome_of(lambda: read_run(tmp_path))
    assert (outcome.error is None) == ("run.json" in files)


@cases(80)
@given(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=8), st.booleans())
def test_a_table_is_as_it_was_written_or_refused(tmp_path: Path, at: int, by: bytes, cut: bool):
    """Its pages have checksums, because a changed token would be trained on."""
    tokens = np.random.default_rng(0).integers(0, 2**31, 2000)  # most of the file
    table = pa.table(
        {"prompt_tokens": pa.array([tokens.tolist(), [4]], pa.list_(pa.int32())), "text": ["a", "b"]}
    )
    path = tmp_path / "table.parquet"
    write_table(table, path)
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : len(content) if cut else at + len(by)] = by
    path.write_bytes(content)
    outcome = outcome_of(lambda: read_table(path))
    if outcome.accepted is not None:
        assert [each.to_pylist() for each in outcome.accepted.columns] == [
            each.to_pylist() for each in table.columns
        ]
    else:
        assert isinstance(outcome.error, ConfigError)


def test_a_table_that_is_not_there(tmp_path: Path):
    """A part of a corpus may be missing: another run can have removed it."""
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.parquet")


@cases(80)
@given(CONTENT | JSON.map(lambda value: json.dumps({"weight_map": value}).encode()))
def test_indexes_of_weights(tmp_path: Path, content: bytes):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_bytes(content)
    outcome = outcome_of(lambda: stored_tensors(tmp_path, "teacher.model", "fetch it again"))
    assert isinstance(outcome.error, ConfigError) and outcome.error.remedy


@cases(60)
@given(st.integers(0, 300), st.binary(min_size=1, max_size=4))
def test_headers_of_weights(tmp_path: Path, at: int, by: bytes):
    path = tmp_path / "model.safetensors"
    save_file({"w": np.ones(2, np.float32)}, path)
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(by)] = by
    path.write_bytes(content)
    outcome = outcome_of(lambda: stored_tensors(tmp_path, "teacher.model", "fetch it again"))
    assert outcome.error is None or isinstance(outcome.error, ConfigError)


CHANGES = st.one_of(
    st.fixed_dictionaries({"num_bytes": st.integers()}),
    st.fixed_dictionaries({"checksum": st.text(max_size=16)}),
    st.fixed_dictionaries({"policy_version": st.integers(0, 9)}),
    st.fixed_dictionaries({"path": st.sampled_from(["", "/", "/dev/null", "weights-v00000001.safetensors", "/x/weights-v00000001.safetensors"])}),
)  # fmt: skip


@cases(80)
@given(CHANGES, st.integers(0, 40), st.booleans())
def test_manifests_of_pushes(tmp_path: Path, changes: dict[str, Any], at: int, changed: bool):
    for path in tmp_path.iterdir():
        path.unlink()
    manifest = write_weights(tmp_path, lambda file: file.write(bytes(41)), policy_version=1, update=1)
    wrong: WeightManifest = dataclasses.replace(manifest, **changes)
    if changed:
        content = bytearray(41)
        content[at] = 1
        Path(manifest.path).write_bytes(content)
        wrong = manifest
    error = outcome_of(lambda: verify_once(wrong)).error
    assert isinstance(error, WeightPushError) or wrong == manifest != changed
