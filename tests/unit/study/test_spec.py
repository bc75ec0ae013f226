"""Study files: what they are read as, and the errors that wrong ones raise."""

from __future__ import annotations

from pathlib import Path

import pytest

import deploy
from deploy.study.spec import load_study
from distill.errors import ConfigError

GOOD = """
name: s
task: tiny-wiki
seeds: [0, 1]
recipes: {kd: {}, both: {recipe: jsd, recipe.beta: 0.5}}
comparisons: [[both, kd]]
settings: {learner: {num_updates: 5}}
tuning: {grid: {learner.learning_rate: [0.1, 0.2], critic.rank: [1, 2, 3]}, seeds: [9]}
"""


def load(tmp_path: Path, text: str):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return load_study(path)


def test_a_study_file(tmp_path):
    spec = load(tmp_path, GOOD)
    assert (spec.baseline, spec.seeds, spec.settings) == ("kd", (0, 1), {"learner.num_updates": 5})
    assert spec.recipes["both"] == {"recipe": "jsd", "recipe.beta": 0.5}
    assert spec.comparisons == (("both", "kd"),)
    assert spec.tuning is not None
    points = list(spec.tuning.points())
    assert len(points) == 6
    assert points[0] == {"learner.learning_rate": 0.1, "critic.rank": 1}


def test_shipped_studies_load():
    for path in (Path(deploy.__file__).parent / "configs" / "studies").glob("*.yaml"):
        assert load_study(path).name == path.stem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: s", "nam: s"), r"^nam must be a key of a study; did you mean name\?$"),
        (("seeds: [0, 1]", "seeds: []"), "seeds=.* must be given"),
        (("seeds: [9]", "seeds: [1]"), "tuning.seeds=.* must have no seed in common with seeds"),
        (("name: s", "name: s\nbaseline: gkd"), "baseline=gkd must be one of kd, both"),
        (("name: s", "name: s\nmetrics: [tv]"), "metrics=tv must be one of teacher_text.tv"),
        (("seeds: [0, 1]", "seeds: 3"), "seeds=3 must be a list"),
        (("{kd: {}, both: {recipe: jsd, recipe.beta: 0.5}}", "[kd]"), "recipes=.* must be a mapping"),
        (("kd: {}", "kd: 1"), "recipes.kd=1 must be a mapping"),
        (
            ("kd: {}", "kd: {tuned_as: gkd}"),
            'recipes.kd.tuned_as="gkd" must be another recipe, one that is itself tuned',
        ),
        (
            ("kd: {}", "kd: {tuned_as: kd}"),
            'recipes.kd.tuned_as="kd" must be another recipe, one that is itself tuned',
        ),
        (("kd: {}", "kd: {seed: 7}"), "recipes.kd.seed=7 must be left out; list it under seeds"),
        (("{num_updates: 5}", "{num_updates: 5}, run_dir: x"), 'settings.run_dir="x" must be left out'),
        (("critic.rank: [1", "seed: [1"), r"tuning.grid.seed=\[1, 2, 3\] must be left out"),
        (("[0.1, 0.2]", "[0.1, 0.1]"), r"learning_rate=\[0.1, 0.1\] must contain each value once"),
        (("kd: {}", "../up: {}"), r'recipes="../up" must be named by letters'),
        (("kd: {}", "1: {}"), "recipes=1 must be named by letters"),
        (
            ("kd: {}", "kd: {}, kd: {}"),
            r"study\.yaml line 5 must be YAML \(found duplicate key kd\); correct the YAML there$",
        ),
        (("seeds: [9]}", "seeds: [9], metric: tvv}"), "tuning.metric=tvv must be one of teacher_text.tv"),
        (("[[both, kd]]", "[[both, jsd]]"), "comparisons=.* must be pairs of kd, both"),
        (
            ("seeds: [9]}", "seeds: [9], metric: length}"),
            "tuning.metric=length must have a better direction",
        ),
        (("[0.1, 0.2]", "0.1"), "tuning.grid.learner.learning_rate=0.1 must be a list"),
        (("settings: {learner: {num_updates: 5}}", "settings: 5"), "settings=5 must be a mapping"),
        ((GOOD, "- 1"), r"study\.yaml must contain a mapping; see docs/studies\.md$"),
        (("seeds: [9]", "sed: 1"), r"^tuning\.sed must be a key of a study; did you mean tuning\.seeds\?$"),
        (("name: s", "run_dir: s"), "^run_dir must be a key of a study; there are name, task"),
        (("name: s", "name: ../s"), r"name=../s must be letters, digits, - and _"),
        (("task: tiny-wiki", "task:"), "task=null must be given"),
        (("seeds: [0, 1]", "seeds: [0, a]"), r'seeds=\[0, "a"\] must be distinct whole numbers >= 0'),
        (("seeds: [0, 1]", "seeds: [0, 0]"), r"seeds=\[0, 0\] must be distinct whole numbers"),
        (("seeds: [0, 1]", "seeds: [-1]"), r"seeds=\[-1\] must be distinct whole numbers"),
        (("seeds: [9]", "seeds: []"), r"tuning.seeds=\[\] must be distinct whole numbers"),
        (("[0.1, 0.2]", "[]"), r"tuning.grid.learner.learning_rate=\[\] must contain a value"),
        (("name: s", "name: s\nbaseline: [kd]"), r"baseline=\['kd'\] must be one of kd, both"),
        (("[[both, kd]]", "[[[both], kd]]"), "comparisons=.* must be pairs of kd, both"),
        (
            ("kd: {}", "kd: {tuned_as: [kd]}"),
            "recipes.kd.tuned_as=.* must be another recipe, one that is itself tuned",
        ),
        ((GOOD, "a: ["), r"study\.yaml line 2 must be YAML \(.+\); correct the YAML there$"),
    ],
)
def test_errors(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD.replace(*change))
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    for name, why in (
        ("nowhere.yaml", "must be a study file that exists; check the path$"),
        ("latin.yaml", r"must be a readable study file \(byte 9 is not UTF-8\)$"),
    ):
        with pytest.raises(ConfigError, match=why):
            load_study(tmp_path / name)


def test_numbers_in_exponent_notation_and_dates(tmp_path):
    """YAML 1.1 reads 1e-3 as text and 2001-01-01 as a date; study files do neither."""
    spec = load(tmp_path, GOOD.replace("[0.1, 0.2]", "[1e-3, 0.2]").replace("5}", "2001-01-01}"))
    assert spec.tuning is not None
    assert spec.tuning.grid["learner.learning_rate"] == [0.001, 0.2]
    assert spec.settings == {"learner.num_updates": "2001-01-01"}
