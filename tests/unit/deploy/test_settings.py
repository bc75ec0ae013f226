"""Where the settings of a run come from, what their paths mean, and what a resumed run may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from deploy.cli.chat import run_chat
from deploy.fetch import cache_dir
from deploy.run.preflight import Preflight
from deploy.run.prepare import prepare
from deploy.run.settings import absolute, config_to_resume, keep_settings, load_run, require_same_settings
from deploy.run.train import train
from distill.config import RunConfig
from distill.config.tree import MAY_CHANGE, flat_settings, resume_fingerprint, to_yaml
from distill.data import read_table
from distill.errors import ConfigError
from distill.run.folder import RunFolder
from tests.tiny import tiny_config, tiny_overrides, write_rows

CUT = ["student.init.from=teacher", "student.init.num_layers=1"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("name", ["run_dir", "data.path", "teacher.model", "proxy.model"])
def test_every_path_counts_from_the_working_directory(home: Path, name: str) -> None:
    (home / "work" / "my data é #1").mkdir()

    def resolved(text: str) -> object:
        return flat_settings(load_run(None, [*CUT, f"{name}={text}"]))[name]

    assert resolved("~/x y") == f"{home}/x y"
    assert resolved("../x") == f"{home}/x"
    assert resolved("./x") == f"{home}/work/x"
    assert resolved("my data é #1") == f"{home}/work/my data é #1"
    assert resolved("/x") == "/x"


def test_a_student_can_be_a_path(home: Path) -> None:
    assert load_run(None, ["student.model=~/x y"]).student.model == f"{home}/x y"


def test_dots_after_a_link_mean_the_folder_above_its_target(home: Path) -> None:
    (home / "far" / "deep").mkdir(parents=True)
    (home / "far" / "rows.jsonl").touch()
    (home / "work" / "link").symlink_to(home / "far" / "deep")
    config = load_run(None, [*CUT, "data.path=link/../rows.jsonl", "run_dir=link/run"])
    assert config.data.path == f"{home}/far/rows.jsonl"
    assert config.run_dir == f"{home}/work/link/run"


def test_a_home_folder_of_an_unknown_user(home: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(None, [*CUT, "run_dir=~nosuchuser/x"])
    assert str(caught.value) == (
        "run_dir=~nosuchuser/x must begin with the home folder of a user that exists; "
        "write the folder in full, or ./~nosuchuser/x if its name begins with ~"
    )
    assert load_run(None, [*CUT, "run_dir=./~nosuchuser/x"]).run_dir == f"{home}/work/~nosuchuser/x"


def test_arguments_and_the_cache_are_paths_of_the_same_kind(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "model").mkdir()
    with pytest.raises(ConfigError, match=rf"^model={home}/model must contain a checkpoint"):
        run_chat("~/model", None, 1)
    for text, folder in (("~/c", home / "c"), ("c", home / "work" / "c")):
        monkeypatch.setenv("DISTILL_CACHE", text)
        assert cache_dir() == folder


def test_names_and_hub_ids_are_no_paths(home: Path) -> None:
    config = load_run(None, [*CUT, "teacher.model=owner/model", "data.path=owner/set"])
    assert (config.teacher.model, config.data.path) == ("owner/model", "owner/set")
    (home / "work" / "smollm2-135m").mkdir()
    config = load_run(None, CUT)
    assert (config.teacher.model, config.data.path) == ("smollm2-135m", "alpaca-demo")
    assert config.run_dir.startswith(f"{home}/work/")


def test_a_home_folder_in_yaml(home: Path) -> None:
    (home / "run.yaml").write_text("run_dir: ~/x\nstudent: {init: {from: teacher, num_layers: 1}}\n")
    assert load_run(home / "run.yaml").run_dir == f"{home}/x"


@pytest.fixture
def begun(world: Path, home: Path) -> tuple[RunConfig, RunFolder]:
    """A run that has been prepared and nothing more."""
    write_rows(home / "rows.jsonl")
    config = tiny_config(world, f"run_dir={home}/run", f"data.path={home}/rows.jsonl")
    folder = RunFolder(config.run_dir)
    with folder:
        folder.create(to_yaml(config), resume_fingerprint(config))
        keep_settings(folder, config)
        prepare(config, checked(config), folder)
    return config, folder


def checked(config: RunConfig) -> Preflight:
    preflight = Preflight(config)
    preflight.run()
    preflight.require()
    return preflight


def test_a_run_resumes_from_another_folder(
    begun: tuple[RunConfig, RunFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, folder = begun
    monkeypatch.chdir("/")
    assert config_to_resume(str(folder.path)) == absolute(config)


HARMLESS = {
    "learner.num_updates": 4, "evaluation.every": 1, "evaluation.num_prompts_during": 3,
    "evaluation.best_metric": "teacher_text.jsd", "checkpoint.every": 3, "checkpoint.keep": 1, "scoring.check": 0,
}  # fmt: skip


def test_harmless_settings_may_change(begun: tuple[RunConfig, RunFolder]) -> None:
    assert set(HARMLESS) == set(MAY_CHANGE)
    _, folder = begun
    changed = config_to_resume(str(folder.path), [f"{name}={value}" for name, value in HARMLESS.items()])
    require_same_settings(folder, changed)
    with folder:
        assert folder.create(to_yaml(changed), resume_fingerprint(changed))


@pytest.mark.parametrize("in_file", [True, False])
def test_other_settings_are_named(begun: tuple[RunConfig, RunFolder], in_file: bool) -> None:
    _, folder = begun
    overrides: Sequence[str] = ["learner.learning_rate=0.5", "seed=9"]
    if in_file:
        text = folder.config.read_text()
        folder.config.write_text(
            text.replace("seed: 0\n", "seed: 9\n", 1).replace("learning_rate: 5.0e-05", "learning_rate: 0.5")
        )
        overrides = ["learner.learning_rate=0.5"]
    with pytest.raises(ConfigError) as caught:
        require_same_settings(folder, config_to_resume(str(folder.path), overrides))
    message = str(caught.value)
    assert message.startswith("seed=9 must stay 0, as it was when the run in")
    assert "learner.learning_rate" in message and "\n" not in message


def test_fewer_updates_than_were_made_are_refused(begun: tuple[RunConfig, RunFolder]) -> None:
    config, folder = begun
    summary = dict.fromkeys(("recipe", "before", "after", "timing_s", "peak_pss_bytes", "wall_s"), 0) | {
        "updates": 3
    }
    folder.summary.write_text(json.dumps(summary))
    with pytest.raises(
        ConfigError, match=r"^learner\.num_updates=2 must be >= 3, the updates that the run in"
    ):
        train(config, None)  # type: ignore[arg-type]


def test_data_that_changed_meanwhile(begun: tuple[RunConfig, RunFolder], home: Path) -> None:
    """The run keeps to its own prompts, and says so."""
    config, folder = begun
    assert not [check for check in checked(config).checks if "has changed" in check.message]
    trained_on = read_table(folder.data / "train.parquet")
    write_rows(home / "rows.jsonl", 12)
    preflight = checked(config)
    (warning,) = (check for check in preflight.checks if "has changed since this run began" in check.message)
    assert warning.status == "warn"
    with folder:
        folder.create(to_yaml(config), resume_fingerprint(config))
        inputs = prepare(config, preflight, folder)
    assert inputs.num_prompts == trained_on.num_rows == 16
    assert pa.Table.equals(read_table(inputs.train_prompts), trained_on)


def test_overrides_of_the_tiny_world_are_settings(world: Path) -> None:
    assert load_run(world / "tiny.yaml", tiny_overrides(world))


def test_the_disk_check_counts_what_a_run_has_already(
    begun: tuple[RunConfig, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = begun
    usage = shutil.disk_usage
    small = usage("/")._replace(free=1 << 20)
    monkeypatch.setattr(
        "deploy.run.preflight.machine.shutil.disk_usage",
        lambda path: small if str(path).startswith(str(folder.path)) else usage(path),
    )
    with pytest.raises(ConfigError, match="free disk"):
        checked(config)
    folder.checkpoints.mkdir(exist_ok=True)
    with (folder.checkpoints / "weights").open("wb") as file:
        file.truncate(1 << 32)
    checked(config)
