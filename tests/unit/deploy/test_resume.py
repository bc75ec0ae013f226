"""Resuming: what may change, what may not, and that every remedy works as it is written."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from deploy.run.preflight import Preflight
from deploy.run.prepare import prepare
from deploy.run.record import PAGE
from deploy.run.settings import config_to_resume, keep_settings, load_run
from distill.config import RunConfig
from distill.config.tree import MAY_CHANGE, flat_settings, resume_fingerprint, to_yaml
from distill.data import read_table
from distill.errors import ConfigError
from distill.run.folder import RunFolder
from tests.tiny import tiny_overrides, write_rows
from tests.unit.deploy.conftest import TRANSFORMERS, Train


@pytest.fixture
def begun(world: Path, home: Path) -> RunFolder:
    """A run that was prepared and nothing more, in a folder with a space, from a relative data file."""
    write_rows(home / "here" / "my rows.jsonl")
    settings = [*tiny_overrides(world), *TRANSFORMERS, "run_dir=~/a run", "data.path=my rows.jsonl"]
    config = load_run(world / "tiny.yaml", settings)
    folder = RunFolder(config.run_dir)
    with folder:
        folder.create(to_yaml(config), resume_fingerprint(config))
        keep_settings(folder, config)
        prepare(config, checked(config), folder)
    return folder


def checked(config: RunConfig) -> Preflight:
    preflight = Preflight(config)
    preflight.run()
    preflight.require()
    return preflight


def stored(folder: RunFolder) -> dict[str, object]:
    return flat_settings(config_to_resume(str(folder.path)))


def commands(line: str) -> list[list[str]]:
    """The arguments of every command of `distill train` that a line tells the user to run."""
    return [shlex.split(command)[2:] for command in re.findall(r"`(distill train [^`]*)`", line)]


def test_a_run_resumes_from_another_folder_as_its_last_line_says(
    begun: RunFolder, train: Train, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(begun)
    monkeypatch.chdir("/")
    *_, line = train("--resume", str(begun.path))
    assert line == f"distill: interrupted; resume with: distill train --resume '{home}/a run'"
    train(*shlex.split(line.partition("distill train ")[2]))
    train("--resume", "~/a run")
    assert stored(begun) == before
    assert before["data.path"] == f"{home}/here/my rows.jsonl"
    assert begun.incarnation == 4


def test_a_moved_run_resumes_in_its_new_place(begun: RunFolder, train: Train, home: Path) -> None:
    begun.path.rename(home / "moved")
    train("--resume", f"{home}/moved")
    assert stored(RunFolder(home / "moved"))["run_dir"] == f"{home}/moved"
    line = train("--resume", f"{home}/moved", "run_dir=elsewhere", refused=True)[0]
    assert f"run_dir=elsewhere must be left out, because the run is in {home}/moved; leave it out" in line


HARMLESS = {
    "learner.num_updates": 4, "evaluation.every": 2, "evaluation.num_prompts_during": 3,
    "evaluation.best_metric": "teacher_text.jsd", "checkpoint.every": 3, "checkpoint.keep": 1, "checkpoint.wait_for_room_s": 5.0,
    "scoring.check": 0,
    "replay.memory_bytes": 1 << 26, "replay.max_bytes": 1 << 31, "replay.segment_bytes": 1 << 20,
    "learner.num_threads": 1, "learner.micro_batch_tokens": 64, "learner.keep_activations": True,
    "learner.vocabulary_chunk": 32, "learner.on_nonfinite": "skip", "learner.max_nonfinite": 3,
    "weights.deadline_s": 9.0, "rollout.max_num_seqs": 4, "scoring.max_num_seqs": 8,
} | {
    f"{section}.{name}": value
    for section in ("rollout", "scoring")
    for name, value in (("num_threads", 1), ("tensor_parallel_size", 2), ("kv_cache_gib", 0.2),
                        ("gpu_memory_utilization", 0.5))
}  # fmt: skip


def test_length_records_and_resources_may_change(begun: RunFolder, train: Train) -> None:
    assert set(HARMLESS) == set(MAY_CHANGE)
    before = stored(begun)
    overrides = [f"{name}={value}" for name, value in HARMLESS.items()]
    assert all(before[name] != value for name, value in HARMLESS.items())
    lines = train("--resume", str(begun.path), *overrides)
    text = "\n".join(lines)
    assert (
        "learner.num_updates=4 (it was 2); from here on, the learning rate is that of the new schedule"
        in text
    )
    assert "scoring.kv_cache_gib=0.2 (it was 0.1)" in text
    assert stored(begun) == before | HARMLESS
    again = "\n".join(train("--resume", str(begun.path)))  # they are the run's from now on
    assert "it was" not in again


@pytest.mark.parametrize("in_file", [True, False])
def test_other_settings_are_named_with_a_remedy_that_works(
    begun: RunFolder, train: Train, in_file: bool
) -> None:
    before = stored(begun)
    changes = ["learner.learning_rate=0.5", "data.path=./other rows.jsonl", "teacher.revision=v 1"]
    if in_file:
        changed = load_run(begun.config, changes)
        begun.config.write_text(to_yaml(changed))
        changes = []
    line = train("--resume", str(begun.path), *changes, refused=True)[0]
    assert "teacher.revision=v 1 must stay null, as it was when the run in" in line
    assert f"data.path={Path.cwd()}/other rows.jsonl was {before['data.path']}; " in line
    assert "learner.learning_rate=0.5 was 0.0001; choose another run_dir for a new run, or continue" in line
    (command,) = commands(line)
    train(*command)
    assert stored(begun) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"])
def test_damaged_settings_are_one_line(begun: RunFolder, train: Train, content: str) -> None:
    begun.settings.write_text(content)
    line = train("--resume", str(begun.path), refused=True)[0]
    assert f"settings={begun.settings} must be " in line and "; bring it back from a copy" in line


def test_a_new_run_in_the_folder_of_another_is_refused(
    begun: RunFolder, train: Train, world: Path, home: Path
) -> None:
    settings = [str(world / "tiny.yaml"), *tiny_overrides(world), *TRANSFORMERS, "data.path=my rows.jsonl"]
    line = train(*settings, "run_dir=~/a run", "seed=5", refused=True)[0]
    assert f"seed=5 must stay 0, as it was when the run in {home}/a run began; choose another run_dir" in line
    (command,) = commands(line)
    train(*command)
    assert begun.incarnation == 2
    train(*settings, "run_dir=~/other", "seed=5")


def with_checkpoints(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        (folder.checkpoints / f"step-{step}").mkdir(parents=True)


def evaluated(folder: RunFolder) -> None:
    folder.evaluations.mkdir()
    folder.evaluation("after").touch()


def test_a_run_needs_an_update_after_its_checkpoint(begun: RunFolder, train: Train) -> None:
    """Its last update evaluates the student; without one, the run would end without a result."""
    with_checkpoints(begun, 3, 4)
    for wanted in (2, 4):
        line = train("--resume", str(begun.path), f"learner.num_updates={wanted}", refused=True)[0]
        assert (
            f"learner.num_updates={wanted} must be >= 5, because the run in {begun.path} has made 4" in line
        )
    train("--resume", str(begun.path), "learner.num_updates=5")


def test_a_run_that_only_lacks_its_summary_ends(begun: RunFolder, train: Train) -> None:
    with_checkpoints(begun, 2)
    evaluated(begun)
    train("--resume", str(begun.path))
    assert begun.evaluation("after").exists()


def test_a_finished_run_that_is_continued_is_not_finished(begun: RunFolder, train: Train) -> None:
    with_checkpoints(begun, 2)
    evaluated(begun)
    summary = dict.fromkeys(("recipe", "before", "after", "timing_s", "peak_pss_bytes", "wall_s"), 0)
    with begun:
        begun._take_lock()
        begun.write_summary(summary | {"updates": 2})
    (begun.path / PAGE).touch()
    line = train("--resume", str(begun.path), "learner.num_updates=1", refused=True)[0]
    assert "learner.num_updates=1 must be >= 2, because the run in" in line
    train("--resume", str(begun.path), "learner.num_updates=4")
    assert not begun.summary.exists() and not begun.evaluation("after").exists()
    assert not (begun.path / PAGE).exists()


def test_data_that_changed_meanwhile(begun: RunFolder, home: Path) -> None:
    """The run keeps to its own prompts, and says so."""
    config = config_to_resume(str(begun.path))
    assert not [check for check in checked(config).checks if "has changed" in check.message]
    trained_on = read_table(begun.data / "train.parquet")
    write_rows(home / "here" / "my rows.jsonl", 12)
    preflight = checked(config)
    (warning,) = (check for check in preflight.checks if "has changed since this run began" in check.message)
    assert warning.status == "warn"
    with begun:
        begun.create(to_yaml(config), resume_fingerprint(config))
        inputs = prepare(config, preflight, begun)
    assert inputs.num_prompts == trained_on.num_rows == 16
    assert pa.Table.equals(read_table(inputs.train_prompts), trained_on)


@pytest.mark.parametrize("missing", ["train.parquet", "heldout.parquet"])
def test_data_that_changed_before_all_tables_were_written(begun: RunFolder, home: Path, missing: str) -> None:
    """A start that died between two tables must not leave rows of the old data among those of the new."""
    (begun.data / missing).unlink()
    write_rows(home / "here" / "my rows.jsonl", 20)
    config = config_to_resume(str(begun.path))
    with begun:
        begun.create(to_yaml(config), resume_fingerprint(config))
        inputs = prepare(config, checked(config), begun)
    rows = [read_table(path).num_rows for path in (inputs.train_prompts, inputs.heldout_prompts)]
    assert rows == [12, 8] and inputs.num_prompts == 12
    assert inputs.references is not None and read_table(inputs.references).num_rows == 12


def test_the_disk_check_counts_what_is_still_to_be_written(
    begun: RunFolder, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_to_resume(str(begun.path))
    student = checked(config).estimates.student_parameters()
    usage = shutil.disk_usage

    def free_bytes_per_parameter(number: int) -> None:
        full = usage("/")._replace(free=number * student)
        monkeypatch.setattr(
            "deploy.run.preflight.machine.shutil.disk_usage",
            lambda path: full if begun.path.is_relative_to(path) else usage(path),
        )

    def fits(*overrides: str) -> bool:
        preflight = Preflight(config_to_resume(str(begun.path), overrides))
        preflight.run()
        assert preflight.failure is None or preflight.failure.name == "free disk"
        return preflight.failure is None

    free_bytes_per_parameter(3 * 12 + 4 * 4 - 1)
    assert not fits()
    *_, line = train("--resume", str(begun.path), refused=True)
    assert line.endswith("free some there, lower checkpoint.keep, or choose another run_dir")
    assert fits("checkpoint.keep=1")
    (begun.data / "anything").write_bytes(
        bytes(1 << 20)
    )  # the run does not write it again, but neither does it help
    assert not fits()
    begun.cut.mkdir()
    assert fits()
    free_bytes_per_parameter(12 + 2 * 4)
    with_checkpoints(begun, 1, 2)
    assert not fits()
    begun.sft.mkdir()
    assert fits()
    free_bytes_per_parameter(12 + 2 * 4 - 1)  # the next checkpoint is written before the oldest is deleted
    assert not fits() and not fits("checkpoint.keep=1")


def test_overrides_follow_the_run_on_the_command_line(begun: RunFolder, train: Train) -> None:
    train("--resume", str(begun.path), "learner.num_updates=3", "checkpoint.every=2")
    train("learner.num_updates=4", "checkpoint.every=3", "--resume", str(begun.path))
    assert (stored(begun)["learner.num_updates"], stored(begun)["checkpoint.every"]) == (4, 3)
    line = train("--resume", str(begun.path), "run.yaml", refused=True)[0]
    assert "train=run.yaml must be key=value after --resume" in line


def test_a_recipe_of_a_resumed_run_is_compared(begun: RunFolder, train: Train) -> None:
    line = train("--resume", str(begun.path), "recipe=kd", refused=True)[0]
    assert "recipe.name=kd must stay ammd" in line
    (command,) = commands(line)
    train(*command)


@pytest.mark.parametrize("text", ["run_dir: [", "- a\n", "sed: 3\n", ""])
def test_a_broken_config_of_a_run_is_one_line(begun: RunFolder, train: Train, text: str) -> None:
    begun.config.write_text(text)
    train("--resume", str(begun.path), refused=True)


def test_resuming_without_a_run(train: Train, home: Path) -> None:
    line = train("--resume", "~/none", refused=True)[0]
    assert f"run_dir={home}/none must be the folder of a run (it has no run.json)" in line
    with pytest.raises(ConfigError, match=r"^--resume=~nosuchuser/x must begin with the home folder"):
        config_to_resume("~nosuchuser/x")


def test_trackers_may_change(begun: RunFolder, train: Train) -> None:
    before = resume_fingerprint(config_to_resume(str(begun.path)))
    assert stored(begun)["tracking.to"] == ["tensorboard"]
    train("--resume", str(begun.path), "tracking.to=[]", "tracking.project=other")
    assert (stored(begun)["tracking.to"], stored(begun)["tracking.project"]) == ([], "other")
    assert resume_fingerprint(config_to_resume(str(begun.path))) == before == begun.fingerprint
