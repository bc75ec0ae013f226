"""Names that come from files and messages lead out of no folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.numpy import save

from deploy.run.tensor_files import INDEX, stored_tensors
from deploy.study.spec import load_study
from deploy.submit.archive import working_files, write_archive
from deploy.submit.submit import Request, contents
from distill.data.sources import read_rows
from distill.errors import ConfigError, DistillError
from distill.files import is_plain_name
from distill.interfaces import Draw, SampleRef, WeightManifest, WeightPushError
from distill.replay.locations import ForeignLocation
from distill.replay.segments import SegmentStore
from distill.run.folder import RunFolder
from distill.weights import loading, verify_once, write_weights
from learner.model.head import Head
from learner.process.checkpoint import MANIFEST, CheckpointError, Checkpoints, _checksum
from tests.unit.replay.builders import sample

OUTSIDE = ("../x", "..", ".", "", "/etc/x", "a/b", "a\\b", "a\0b", "../../x.arrow", None, 3, ["a"])


def located(**changes: Any) -> SampleRef:
    found = sample(Draw(table="student_text", number=0, epoch=0, index=0), segment="w-0.arrow")
    return dataclasses.replace(found, location=dataclasses.replace(found.location, **changes))


def test_plain_names():
    assert not any(map(is_plain_name, OUTSIDE))
    assert all(
        map(is_plain_name, ("a", "model-00001-of-00002.safetensors", "..a", "é", "rollout-0.0-0.arrow"))
    )


@pytest.mark.parametrize("name", OUTSIDE)
def test_segments(tmp_path: Path, name: Any):
    """A name in a message can neither read nor delete a file outside of the folders."""
    (tmp_path / "x.arrow").write_text("keep")
    store = SegmentStore(tmp_path / "a" / "m", tmp_path / "a" / "s", "w", "n", 1 << 20, 1 << 20)
    found = located(segment=name)
    with pytest.raises(ForeignLocation):
        store.read(found)
    with pytest.raises(ForeignLocation):
        store.delete(["w-0.arrow", name])
    assert (tmp_path / "x.arrow").read_text() == "keep"


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 8), (0, 0), (0, -8), (True, 8), (0, 8.0), ("0", 8)])
def test_places_in_segments(tmp_path: Path, offset: Any, num_bytes: Any):
    store = SegmentStore(tmp_path / "m", tmp_path / "s", "w", "n", 1 << 20, 1 << 20)
    found = located(offset=offset, num_bytes=num_bytes)
    with pytest.raises(ForeignLocation, match="must be a number of bytes"):
        store.read(found)


@pytest.mark.parametrize("name", [each for each in OUTSIDE if isinstance(each, str)])
def test_shards_of_a_checkpoint(tmp_path: Path, name: str):
    folder = Checkpoints(tmp_path, keep=1).save(1, {"w": torch.ones(2)}, {"a": 1})
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"] = {name: manifest["shards"]["rank-0.safetensors"]}
    del manifest["xxh3"]
    manifest["xxh3"] = _checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="must name files in the folder of the checkpoint"):
        Checkpoints.load(folder)


def test_files_of_a_model(tmp_path: Path):
    """The author of a checkpoint cannot have another file of this machine read as weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(save({"lm_head.weight": np.ones((2, 2), np.float32)}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    with pytest.raises(ConfigError, match="must name files of its folder"):
        stored_tensors(folder, "teacher.model", "fetch it again")
    with pytest.raises(ConfigError, match="must name files of its own folder"):
        Head.from_checkpoint(folder)


@pytest.mark.parametrize(
    "path", ["{}/other.safetensors", "{}/weights-v00000002.safetensors", "{}/../{name}/x"]
)
def test_pushes(tmp_path: Path, path: str):
    manifest = write_weights(tmp_path, lambda file: file.write(b"x"), policy_version=1, update=1)
    (tmp_path / "other.safetensors").write_bytes(b"x")
    wrong = dataclasses.replace(manifest, path=path.format(tmp_path, name=tmp_path.name))
    for use in (verify_once, lambda each: loading(each).__enter__()):
        with pytest.raises(WeightPushError, match=r"must be named weights-v00000001\.safetensors"):
            use(wrong)
    assert not list(tmp_path.glob("*.verified"))
    assert isinstance(wrong, WeightManifest)


@pytest.mark.parametrize("name", ["../x.arrow", "/etc/x.arrow", 3])
def test_files_of_a_saved_data_set(tmp_path: Path, name: Any):
    saved = tmp_path / "saved"
    Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(str(saved))
    assert len(read_rows(str(saved), "train", tmp_path)) == 1
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"][0]["filename"] = name
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="must name only files of its own"):
        read_rows(str(saved), "train", tmp_path)


def test_splits_of_a_saved_data_set(tmp_path: Path):
    saved = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_list([{"prompt": "a"}])}).save_to_disk(str(saved))
    assert len(read_rows(str(saved), "train", tmp_path)) == 1
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "../other"]}))
    with pytest.raises(ConfigError, match=r"it names '\.\./other'"):
        read_rows(str(saved), "train", tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\..\\x", ""])
def test_members_of_an_upload(tmp_path: Path, name: str):
    (tmp_path / "x").write_text("x")
    with pytest.raises(ConfigError, match="must be a path below the working directory"):
        write_archive({"fine": tmp_path / "x", name: tmp_path / "x"}, tmp_path / "job.zip")
    assert not (tmp_path / "job.zip").exists()


def test_a_configuration_beside_the_working_directory_is_no_member_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    (tmp_path / "my.yaml").write_text("student: {init: {from: teacher, num_layers: 2}}\nrun_dir: /shared/x\n")
    files, arguments = contents(Request(config=Path("../my.yaml"), resume=None, overrides=[]), root)
    assert arguments == ["submitted/my.yaml"] and "submitted/my.yaml" in files
    assert not [name for name in files if ".." in name]


def test_credentials_and_links_that_lead_out_stay_here(tmp_path: Path):
    root = tmp_path / "project"
    for name in (
        "rows.jsonl",
        ".env",
        ".env.local",
        "sub/.netrc",
        "sub/server.pem",
        "sub/id_rsa",
        ".aws/credentials",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (tmp_path / "secret").write_text("x")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "inside").symlink_to(root / "rows.jsonl")
    assert set(working_files(root)) == {"rows.jsonl", "inside"}


@pytest.mark.parametrize("label", ["../after", "/x", "", "a/b"])
def test_evaluations(tmp_path: Path, label: str):
    """A checkpoint says which evaluation its alarms saw last."""
    with pytest.raises(ConfigError, match="must be a name such as step-10"):
        RunFolder(tmp_path).evaluation(label)


@pytest.mark.parametrize("key", ["name", "recipes"])
@pytest.mark.parametrize("name", ["../x", "/x", "..", ".x", "a/b", "a b", "a\\b", "x\n"])
def test_names_in_a_study(tmp_path: Path, key: str, name: str):
    tree: dict[str, Any] = {"name": "a", "task": "tiny-wiki", "seeds": [0], "recipes": {"kd": {}}}
    tree[key] = name if key == "name" else {name: {"recipe": "kd"}}
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(tree))
    with pytest.raises(DistillError, match="must be"):
        load_study(path)
