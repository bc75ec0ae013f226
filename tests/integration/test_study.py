"""Whole studies: real runs of a random tiny Llama, each in its own process."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deploy.report.render import markdown
from deploy.study.processes import ProcessFailed
from deploy.study.runner import Study, StudyUnfinished
from deploy.study.spec import StudySpec, Tuning
from deploy.study.tables.plots import draw
from deploy.study.tables.study_report import study_report
from deploy.study.tasks import registry as tasks
from distill.errors import ConfigError
from tests.tiny import make_world, tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENGINES = {
    "rollout.engine": "transformers",
    "scoring.engine": "transformers",
    "cluster.backend": "in_process",
}


@pytest.fixture(autouse=True)
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tmp_path / "world"
    make_world(world)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    pairs = (text.split("=", 1) for text in tiny_overrides(world))
    settings = {name: yaml.safe_load(value) for name, value in pairs if name != "run_dir"} | ENGINES
    settings["data.path"] = "{task}/rows.jsonl"
    task = tasks.Task(settings=lambda tuning: dict(settings), make=lambda say: None, folder=lambda: world)
    monkeypatch.setattr(tasks, "TASKS", {"tiny": task})


def spec(**changes: object) -> StudySpec:
    values = {
        "name": "s",
        "task": "tiny",
        "seeds": (0, 1),
        "baseline": "kd",
        "metrics": ("teacher_text.tv", "rouge_l.teacher"),
        "recipes": {"kd": {}, "ammd": {"recipe.beta": 0.5}},
        "texts": True,
        "tuning": Tuning(
            grid={"learner.learning_rate": [1e-4, 1e-2]}, seeds=(9,), settings={"learner.num_updates": 1},
            metric="teacher_text.tv",
        ),
    }  # fmt: skip
    return StudySpec(**(values | changes))  # type: ignore[arg-type]


def test_a_study_runs_and_resumes(tmp_path: Path) -> None:
    messages: list[str] = []
    folder = tmp_path / "study"
    results = Study(spec(), folder, num_jobs=2, say=messages.append).run()
    assert [(run["recipe"], run["seed"]) for run in results["runs"]] == [
        ("kd", 0), ("ammd", 0), ("kd", 1), ("ammd", 1),
    ]  # fmt: skip
    assert len(results["tuning"]) == 4
    assert {point["update"] for point in results["runs"][0]["evaluations"]} == {0, 1, 2}
    assert results["runs"][0]["evaluations"][-1]["train_s"] > 0
    table = markdown(study_report(results))
    assert table.count("\n| `") == 9  # two recipes in four tables, one with critics
    assert "nan" not in table
    assert [of_seed["seed"] for of_seed in results["teacher"]] == [0, 1]
    assert "| the teacher itself | " in table
    assert {path.name for path in draw(results, folder)} == {"curves.svg", "frontier.svg"}
    assert "learning_rate" in table

    assert Study(spec(), folder, say=messages.append).finished() == results
    more = Study(
        spec(recipes={"kd": {}, "ammd": {"recipe.beta": 0.5}, "jsd": {}}), folder, say=messages.append
    )
    assert more.finished() | {"asked": results["asked"]} == results, (
        "a recipe that has not run must not appear"
    )
    follows = {"kd": {}, "kd_longer": {"recipe": "kd", "tuned_as": "kd", "learner.num_updates": 3}}
    longer = Study(
        spec(recipes=follows, seeds=(0,), comparisons=(("kd_longer", "kd"),)), folder, say=messages.append
    ).run()
    assert longer["chosen"]["kd_longer"] == longer["chosen"]["kd"] == results["chosen"]["kd"]
    assert len(longer["tuning"]) == 2, "kd_longer must not be tuned itself"
    assert longer["runs"][1]["evaluations"][-1]["update"] == 3
    assert "| `kd_longer` − `kd` | " in markdown(study_report(longer))
    with pytest.raises(StudyUnfinished, match="baseline=jsd must have a run that finished without diverging"):
        Study(spec(recipes={"jsd": {}}, baseline="jsd"), folder).finished()

    again: list[str] = []
    repeated = Study(spec(), folder, say=again.append).run()
    assert repeated == results
    assert [line for line in again[1:] if "note" not in line] == [
        "4/8: finished earlier",
        "8/8: finished earlier",
    ]
    assert markdown(study_report(repeated)) == table


def test_wrong_studies_fail_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe=kdd must be one of"):
        Study(spec(recipes={"kd": {}, "kdd": {}}), tmp_path / "a").run()
    with pytest.raises(ConfigError, match="task=tinny must be one of tiny"):
        Study(spec(task="tinny"), tmp_path / "b").run()
    too_high = spec(recipes={"kd": {}, "ammd": {"critic.rank": 9999}}, tuning=None)
    with pytest.raises(ConfigError, match=r"recipes.ammd: critic.rank=9999 must be <= the hidden size"):
        Study(too_high, tmp_path / "e").run()
    assert not (tmp_path / "e" / "runs").exists(), "the error must come before the runs of kd"
    reported = spec(settings={"evaluation.num_prompts": 9}, tuning=Tuning(
        grid={}, seeds=(9,), settings={"evaluation.num_prompts": 4}, metric="teacher_text.tv",
    ))  # fmt: skip
    messages: list[str] = []
    with pytest.raises(ConfigError, match=r"evaluation.num_prompts=9 must be <= data\.num_heldout"):
        Study(reported, tmp_path / "d", say=messages.append).run()
    assert messages == [], "the error must come before the tuning runs"
    nowhere = spec(recipes={"kd": {}, "ammd": {"data.path": "/nowhere.jsonl"}}, tuning=None)
    with pytest.raises(ConfigError, match=r"recipes.ammd: data.path=/nowhere.jsonl"):
        Study(nowhere, tmp_path / "c").run()


def test_a_failed_run_stops_a_study_and_a_diverged_run_does_not(tmp_path: Path) -> None:
    wild = {"recipe": "kd", "learner.learning_rate": 1e30, "learner.max_grad_norm": 1e30}
    study = spec(recipes={"kd": {}, "wild": wild}, seeds=(0,), tuning=None, texts=False)
    results = Study(study, tmp_path / "study", num_jobs=2).run()
    assert [(run["recipe"], run["seed"]) for run in results["diverged"]] == [("wild", 0)]
    assert [run["recipe"] for run in results["runs"]] == ["kd"]
    assert "left out of every table: `wild` seed 0." in markdown(study_report(results))
    broken = Study(spec(recipes={"kd": {}}, tuning=None), tmp_path / "broken", num_jobs=2)
    job = broken._jobs.job("kd", 1, {}, tuning=False)
    job.run_dir.parent.mkdir(parents=True)
    job.run_dir.write_text("a file where the run's folder belongs")
    with pytest.raises(
        ProcessFailed, match=r"exit code of kd seed 1=2 must be 0 \(.*run_dir=.*\); read its output in"
    ):
        broken.run()
