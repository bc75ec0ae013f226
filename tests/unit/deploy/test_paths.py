"""What the paths in settings and arguments mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.cli.chat import run_chat
from deploy.fetch import cache_dir
from deploy.run.settings import load_run
from distill.config.tree import flat_settings
from distill.errors import ConfigError
from tests.tiny import tiny_overrides

CUT = ["student.init.from=teacher", "student.init.num_layers=1"]


@pytest.mark.parametrize("name", ["run_dir", "data.path", "teacher.model", "proxy.model"])
def test_every_path_counts_from_the_working_directory(home: Path, name: str) -> None:
    (home / "here" / "my data é #1").mkdir()

    def resolved(text: str) -> object:
        return flat_settings(load_run(None, [*CUT, f"{name}={text}"]))[name]

    assert resolved("~/x y") == f"{home}/x y"
    assert resolved("../x") == f"{home}/x"
    assert resolved("./x") == f"{home}/here/x"
    assert resolved("my data é #1") == f"{home}/here/my data é #1"
    assert resolved("/x") == "/x"


def test_a_student_can_be_a_path(home: Path) -> None:
    assert load_run(None, ["student.model=~/x y"]).student.model == f"{home}/x y"


def test_dots_after_a_link_mean_the_folder_above_its_target(home: Path) -> None:
    (home / "far" / "deep").mkdir(parents=True)
    (home / "far" / "rows.jsonl").touch()
    (home / "here" / "link").symlink_to(home / "far" / "deep")
    config = load_run(None, [*CUT, "data.path=link/../rows.jsonl", "run_dir=link/run"])
    assert config.data.path == f"{home}/far/rows.jsonl"
    assert config.run_dir == f"{home}/here/link/run"


def test_a_home_folder_of_an_unknown_user(home: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(None, [*CUT, "run_dir=~nosuchuser/x"])
    assert str(caught.value) == (
        "run_dir=~nosuchuser/x must begin with the home folder of a user that exists; "
        "write the folder in full, or ./~nosuchuser/x if its name begins with ~"
    )
    assert load_run(None, [*CUT, "run_dir=./~nosuchuser/x"]).run_dir == f"{home}/here/~nosuchuser/x"


def test_arguments_and_the_cache_are_paths_of_the_same_kind(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "model").mkdir()
    with pytest.raises(ConfigError, match=rf"^model={home}/model must contain a checkpoint"):
        run_chat("~/model", None, 1)
    for text, folder in (("~/c", home / "c"), ("c", home / "here" / "c")):
        monkeypatch.setenv("DISTILL_CACHE", text)
        assert cache_dir() == folder


def test_names_and_hub_ids_are_no_paths(home: Path) -> None:
    config = load_run(None, [*CUT, "teacher.model=owner/model", "data.path=owner/set"])
    assert (config.teacher.model, config.data.path) == ("owner/model", "owner/set")
    (home / "here" / "smollm2-135m").mkdir()
    config = load_run(None, CUT)
    assert (config.teacher.model, config.data.path) == ("smollm2-135m", "alpaca-demo")
    assert config.run_dir.startswith(f"{home}/here/")


def test_a_home_folder_in_yaml(home: Path) -> None:
    (home / "run.yaml").write_text("run_dir: ~/x\nstudent: {init: {from: teacher, num_layers: 1}}\n")
    assert load_run(home / "run.yaml").run_dir == f"{home}/x"


def test_overrides_of_the_tiny_world_are_settings(world: Path) -> None:
    assert load_run(world / "tiny.yaml", tiny_overrides(world))
