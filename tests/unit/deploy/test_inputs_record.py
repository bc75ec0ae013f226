"""A run continues only with the data, the models and the corpora that it began with, wherever they are by now."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from deploy.run.inputs_record import InputsRecord, input_parts, keep_corpora
from deploy.run.preflight import Preflight
from deploy.run.prepare import prepare
from deploy.run.settings import config_to_resume
from distill.config.tree import resume_fingerprint, to_yaml
from distill.errors import ConfigError
from distill.run.folder import RunFolder
from tests.tiny import make_world, save_tiny_llama, tiny_overrides, write_rows
from tests.unit.deploy.conftest import TRANSFORMERS, Train

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40


@pytest.fixture
def own_world(home: Path) -> Path:
    """A teacher and rows that a test may change."""
    make_world(home / "world")
    return home / "world"


def settings_of(world: Path, *more: str) -> list[str]:
    return [str(world / "tiny.yaml"), *tiny_overrides(world), *TRANSFORMERS, *more]


@pytest.fixture
def begun(own_world: Path, train: Train) -> RunFolder:
    """A run that recorded its inputs and was interrupted before its stages."""
    train(*settings_of(own_world))
    return RunFolder(own_world / "run")


def resume(folder: RunFolder, *overrides: str) -> tuple[str, ...]:
    return ("--resume", str(folder.path), *overrides)


def command(line: str) -> list[str]:
    """The arguments of the command that a refusal tells the user to run."""
    (found,) = re.findall(r"`distill train ([^`]*)`", line)
    return shlex.split(found)


def flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def scale_weights(folder: Path) -> None:
    """Replace the weights by others of the same shapes, and so of the same size."""
    file = folder / "model.safetensors"
    size = file.stat().st_size
    save_file(
        {name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    assert file.stat().st_size == size


def test_a_new_run_records_its_inputs(begun: RunFolder, own_world: Path) -> None:
    record = InputsRecord.read(begun)
    assert record is not None
    assert record.inputs["data.path"].num_bytes == (own_world / "rows.jsonl").stat().st_size
    assert record.inputs["teacher.model (config.json and weights)"].place == str(own_world / "teacher")
    tokenizer_files = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert {name for name in record.inputs if name.startswith("teacher.model")} == {
        "teacher.model (config.json and weights)", *(f"teacher.model ({name})" for name in tokenizer_files)
    }  # fmt: skip
    assert {"torch", "transformers"} <= set(record.versions)


def test_a_changed_data_file_is_refused_until_it_is_brought_back(
    begun: RunFolder, own_world: Path, train: Train
) -> None:
    rows = own_world / "rows.jsonl"
    kept = rows.read_bytes()
    flip_middle(rows)
    line = train(*resume(begun), refused=True)[0]
    part = rf"([0-9a-f]{{16}}) \({len(kept)} bytes in {rows}\)"
    found = re.match(rf"distill: data\.path={part} must stay {part}, as it was when", line)
    assert found and found[1] != found[2], line
    assert f"as it was when the run in {begun.path} began; choose another run_dir for a new run" in line
    assert "or bring back the content of data.path and continue that run with" in line
    assert begun.incarnation == 1
    rows.write_bytes(kept)
    train(*command(line))
    assert begun.incarnation == 2


def test_times_of_files_do_not_matter(begun: RunFolder, own_world: Path, train: Train) -> None:
    for file in (own_world / "rows.jsonl", *(own_world / "teacher").iterdir()):
        os.utime(file, (1, 1))
    lines = train(*resume(begun))
    assert not [line for line in lines if "warning" in line and "inputs" in line]


def test_a_teacher_that_is_replaced_in_place(begun: RunFolder, own_world: Path, train: Train) -> None:
    scale_weights(own_world / "teacher")
    line = train(*resume(begun), refused=True)[0]
    assert line.startswith("distill: teacher.model (config.json and weights)=")
    assert "bring back the content of teacher.model (config.json and weights) and continue" in line


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_files_beside_the_weights(begun: RunFolder, own_world: Path, train: Train, name: str) -> None:
    file = own_world / "teacher" / name
    file.write_text(file.read_text() + "\n")
    line = train(*resume(begun), refused=True)[0]
    assert line.startswith(f"distill: teacher.model ({name})=")


def test_a_file_that_is_new_or_gone(begun: RunFolder, own_world: Path, train: Train) -> None:
    (own_world / "teacher" / "chat_template.jinja").unlink()
    (own_world / "teacher" / "added_tokens.json").write_text("{}")
    line = train(*resume(begun), refused=True)[0]
    assert "teacher.model (chat_template.jinja)=missing was " in line
    assert re.search(r"teacher\.model \(added_tokens\.json\)=\S+ \(2 bytes in \S+\) must stay missing", line)


def test_one_error_lists_everything_that_differs(begun: RunFolder, own_world: Path, train: Train) -> None:
    kept = {
        path: path.read_bytes() for path in (own_world / "rows.jsonl", own_world / "teacher/tokenizer.json")
    }
    for path in kept:
        flip_middle(path)
    line = train(*resume(begun, "recipe.beta=0.5", "learner.num_updates=9"), refused=True)[0]
    assert line.startswith("distill: recipe.beta=0.5 must stay 0.25, as it was")
    assert re.search(r"; data\.path=.* was .*; teacher\.model \(tokenizer\.json\)=.* was ", line)
    assert "num_updates" not in line  # it may change
    assert "bring back the content of data.path, teacher.model (tokenizer.json) and continue" in line
    for path, content in kept.items():
        path.write_bytes(content)
    train(*command(line))


def test_other_settings_are_named_even_if_their_inputs_are_missing(begun: RunFolder, train: Train) -> None:
    line = train(*resume(begun, "seed=5", "data.path=/none.jsonl"), refused=True)[0]
    assert line.startswith("distill: seed=5 must stay 0")
    line = train(*resume(begun, "data.path=/none.jsonl"), refused=True)[0]
    assert line.startswith("distill: data.path=/none.jsonl must be a file that exists")


def test_settings_that_may_change_still_may(begun: RunFolder, train: Train) -> None:
    assert "learner.num_updates=5 (it was 2)" in "\n".join(train(*resume(begun, "learner.num_updates=5")))


def test_inputs_may_move(begun: RunFolder, own_world: Path, train: Train, home: Path) -> None:
    (own_world / "rows.jsonl").rename(home / "moved.jsonl")
    (own_world / "teacher").rename(home / "moved-teacher")
    places = [f"data.path={home}/moved.jsonl", f"teacher.model={home}/moved-teacher"]
    text = "\n".join(train(*resume(begun, *places)))
    assert f"data.path={home}/moved.jsonl (it was {own_world}/rows.jsonl), with the same content" in text
    train(*resume(begun))  # they are the run's places from now on
    assert begun.incarnation == 3
    (home / "moved.jsonl").rename(own_world / "rows.jsonl")
    train(*resume(begun, f"data.path={own_world}/rows.jsonl"))


def test_another_place_with_other_content(begun: RunFolder, own_world: Path, train: Train) -> None:
    other = write_rows(own_world / "other.jsonl", 20)
    line = train(*resume(begun, f"data.path={other}"), refused=True)[0]
    assert f"bytes in {other}) must stay " in line and "bring back" not in line
    assert command(line)[-1] == f"data.path={own_world}/rows.jsonl"
    train(*command(line))
    line = train(*settings_of(own_world, f"data.path={other}"), refused=True)[0]  # a new run in its folder
    assert f"bytes in {other}) must stay " in line


def test_files_of_a_folder_are_named(own_world: Path, train: Train) -> None:
    shards = own_world / "shards"
    shards.mkdir()
    for number in (1, 2):
        write_rows(shards / f"part-{number}.jsonl")
    train(*settings_of(own_world, f"data.path={shards}"))
    run = RunFolder(own_world / "run")
    shards.rename(own_world / "moved")
    train(*resume(run, f"data.path={own_world}/moved"))
    train(*resume(run, f"data.path={own_world}/moved/*.jsonl"))
    flip_middle(own_world / "moved" / "part-2.jsonl")
    line = train(*resume(run), refused=True)[0]
    assert line.startswith("distill: data.path (part-2.jsonl)=") and "part-1" not in line


def test_student_and_proxy(own_world: Path, train: Train) -> None:
    for name, seed in (("student", 1), ("proxy", 2)):
        save_tiny_llama(own_world / name, seed=seed)
    models = ["student.init.from=null", "student.init.num_layers=null", f"student.model={own_world}/student",
              "recipe=ammd_blackbox", f"proxy.model={own_world}/proxy"]  # fmt: skip
    train(*settings_of(own_world, *models))
    for name in ("student", "proxy"):
        scale_weights(own_world / name)
    line = train(*resume(RunFolder(own_world / "run")), refused=True)[0]
    assert line.startswith("distill: student.model (config.json and weights)=")
    assert "; proxy.model (config.json and weights)=" in line and "teacher.model (" not in line


@pytest.fixture
def hub(own_world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one commit of ``owner/teacher``, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(own_world / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = own_world / "hub" / "models--owner--teacher"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(own_world / "teacher", repository / "snapshots" / COMMIT)
    return repository


def test_a_hub_model_is_known_by_its_commit(hub: Path, own_world: Path, train: Train) -> None:
    train(*settings_of(own_world, "teacher.model=owner/teacher"))
    run = RunFolder(own_world / "run")
    train(*resume(run))
    other = hub / "snapshots" / OTHER_COMMIT
    shutil.copytree(hub / "snapshots" / COMMIT, other)
    (hub / "refs" / "main").write_text(OTHER_COMMIT)
    train(*resume(run))  # a commit of the model card, say
    (hub / "refs" / "main").write_text(COMMIT)
    train(*resume(run))
    scale_weights(other)
    (hub / "refs" / "main").write_text(OTHER_COMMIT)
    line = train(*resume(run), refused=True)[0]
    assert f"snapshots/{OTHER_COMMIT}) must stay " in line
    assert command(line)[-1] == f"teacher.revision={COMMIT}"
    train(*command(line))


def test_rows_of_a_hub_data_set(begun: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def found(answer: str) -> str:
        rows = datasets.Dataset.from_list([{"prompt": "Q", "completion": answer}])
        monkeypatch.setattr(datasets, "load_dataset", lambda path, split: rows)
        config = config_to_resume(str(begun.path))
        parts = input_parts(replace(config, data=replace(config.data, path="owner/set")))
        return parts["data.path"].fingerprint

    assert found("A") == found("A") != found("B")


def test_a_folder_of_saved_rows(begun: RunFolder, own_world: Path) -> None:
    import datasets

    saved = own_world / "saved"
    datasets.Dataset.from_list([{"prompt": "Q", "completion": "A"}]).save_to_disk(str(saved))
    config = config_to_resume(str(begun.path))
    config = replace(config, data=replace(config.data, path=str(saved)))
    before = input_parts(config)
    assert any(name.endswith(".arrow)") for name in before)
    (saved / "cache-1234.arrow").write_text("results of a map, which are not read")
    assert input_parts(config) == before


def test_a_run_of_an_earlier_version_continues_with_one_warning(
    begun: RunFolder, own_world: Path, train: Train
) -> None:
    begun.inputs.unlink()
    begun.data.mkdir()
    for name in ("train.parquet", "heldout.parquet"):
        shutil.copy(write_prompts(begun, name), begun.data / name)
    rows = own_world / "rows.jsonl"
    line = train(*resume(begun, f"data.path={rows}.moved"), refused=True)[0]
    assert f"data.path={rows}.moved must stay {rows}" in line  # nothing says that the content is the same
    warnings = [line for line in train(*resume(begun)) if "has no inputs.json" in line]
    assert len(warnings) == 1
    assert not [line for line in train(*resume(begun)) if "has no inputs.json" in line]
    flip_middle(rows)
    train(*resume(begun), refused=True)


def write_prompts(folder: RunFolder, name: str) -> Path:
    """A prompt table of the run, in another folder."""
    config = config_to_resume(str(folder.path))
    config = replace(config, run_dir=f"{folder.path}-{name}")
    other = RunFolder(config.run_dir)
    with other:
        other.create(to_yaml(config), resume_fingerprint(config))
        prepare(config, checked(config), other)
    return other.data / name


def checked(config: Any) -> Preflight:
    preflight = Preflight(config)
    preflight.run()
    preflight.require()
    return preflight


def test_other_versions_are_a_warning(begun: RunFolder, train: Train) -> None:
    content = json.loads(begun.inputs.read_text())
    content["versions"] |= {"torch": "1.0", "gone": "2.0"}
    begun.inputs.write_text(json.dumps(content))
    (line,) = (line for line in train(*resume(begun)) if "other versions" in line)
    assert re.search(r"warning: .*: gone is missing \(it was 2\.0\), torch [\w.+]+ \(it was 1\.0\)$", line)
    assert not [line for line in train(*resume(begun)) if "other versions" in line]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "must be JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "must contain inputs_format, inputs, corpora, versions"),
        ('{"inputs_format": 9, "inputs": {}, "corpora": {}, "versions": {}}', "inputs_format=9 must be 1"),
        ('{"inputs_format": 1, "inputs": [], "corpora": {}, "versions": {}}', "must be a record of a run's inputs"),
        ('{"inputs_format": 1, "inputs": {"data.path": {}}, "corpora": {}, "versions": {}}', "must be a record"),
        ('{"inputs_format": 1, "inputs": {"data.path": {"place": "x", "num_bytes": 1, "fingerprint": 5}}, '
         '"corpora": {}, "versions": {}}', "must be text"),
    ],
)  # fmt: skip
def test_a_broken_record_is_one_line(begun: RunFolder, train: Train, text: str, says: str) -> None:
    begun.inputs.write_text(text)
    line = train(*resume(begun), refused=True)[0]
    assert says in line and "bring it back from a copy; or delete it" in line
    begun.inputs.unlink()
    train(*command(line))
    assert InputsRecord.read(begun) is not None


def test_the_record_of_another_run_is_noticed(begun: RunFolder, own_world: Path, train: Train) -> None:
    write_rows(own_world / "other.jsonl", 20)
    train(*settings_of(own_world, f"data.path={own_world}/other.jsonl", f"run_dir={own_world}/run-2"))
    shutil.copy(own_world / "run-2" / "inputs.json", begun.inputs)
    assert train(*resume(begun), refused=True)[0].startswith("distill: data.path=")


def test_corpora_are_recorded_and_compared(begun: RunFolder) -> None:
    config = config_to_resume(str(begun.path))
    with begun:
        begun.create(to_yaml(config), resume_fingerprint(config))
        inputs = prepare(config, checked(config), begun)
    keep_corpora(begun, config, inputs)
    record = InputsRecord.read(begun)
    assert record is not None
    assert {name: part.fingerprint for name, part in record.corpora.items()} == {
        "corpus (held-out)": Path(inputs.heldout_corpus).stem,
        "corpus (training)": Path(inputs.teacher_text).stem,
    }
    keep_corpora(begun, config, replace(inputs, heldout_corpus=f"/moved/{Path(inputs.heldout_corpus).name}"))
    other = replace(inputs, teacher_text="/cache/0123.parquet")
    with pytest.raises(
        ConfigError, match=r"corpus \(training\)=0123 \(/cache/0123.parquet\) must stay .* began"
    ):
        keep_corpora(begun, config, other)


def test_the_teacher_is_hashed_once(begun: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_to_resume(str(begun.path))
    with begun:
        begun.create(to_yaml(config), resume_fingerprint(config))
        taken = prepare(config, checked(config), begun)
        record = InputsRecord.read(begun)
        assert record is not None
        monkeypatch.delattr("deploy.run.prepare.checkpoint_fingerprint")
        teacher = record.inputs["teacher.model (config.json and weights)"].fingerprint
        assert prepare(config, checked(config), begun, teacher) == taken
