"""`distill init`: the file that it writes passes `distill doctor`, and its commands work as printed."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deploy import PRESETS
from deploy.cli.main import main
from deploy.config_docs import config_docs
from deploy.recipes import read_recipes
from distill.config.load import load_config
from distill.config.tree import flat_settings, flatten
from tests.tiny import save_tiny_llama, write_rows

Written = Callable[..., list[str]]
PAGE = config_docs()


@pytest.fixture
def init(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Written:
    """A function that runs `distill init` in a new folder with a cache of its own; returns the commands to run next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> list[str]:
        code = main(["init", *arguments])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return [line.strip() for line in out.splitlines()[1:]]

    return run


@pytest.fixture
def complaint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """A function that runs `distill init run.yaml` with wrong arguments; returns its line, which wrote nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["init", "run.yaml", *arguments]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def doctor(command: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, str]:
    """The status of every check of a printed `distill doctor` command."""
    main([*shlex.split(command)[1:], "--json", *more])
    return {check["name"]: check["status"] for check in json.loads(capsys.readouterr().out)["checks"]}


@pytest.mark.parametrize("recipe", ["ammd", "kd", "opd", "ammd_blackbox", "distillm"])
def test_the_file_passes_doctor(
    init: Written, world: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = init("--teacher", f"{world}/teacher", "--data", f"{world}/rows.jsonl", "--recipe", recipe)
    assert [command.split()[1:] for command in commands] == [["doctor", "run.yaml"], ["train", "run.yaml"]]
    checks = doctor(commands[0], capsys)
    assert set(checks.values()) <= {"pass", "warn"} and "disk" in checks  # the last check
    config = load_config("run.yaml", (), PRESETS)
    assert config.recipe.name == recipe
    assert (config.student.init.num_layers, config.data.num_heldout, config.evaluation.num_prompts) == (
        1,
        6,
        6,
    )


def test_paths_with_spaces_and_a_student_of_its_own(
    init: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("my teacher: large", "my student #2"):
        save_tiny_llama(tmp_path / name)
    write_rows(tmp_path / "it's data.jsonl")
    commands = init(
        "new folder/a run's file.yaml", "--teacher", "my teacher: large", "--student", "./my student #2",
        "--data", "it's data.jsonl",
    )  # fmt: skip
    assert set(doctor(commands[0], capsys).values()) <= {"pass", "warn"}
    config = load_config("new folder/a run's file.yaml", (), PRESETS)
    assert (config.teacher.model, config.student.model) == ("my teacher: large", "./my student #2")
    assert config.student.init.source is None
    assert (config.data.path, config.run_dir) == ("it's data.jsonl", "runs/a run's file")


def test_a_printed_command_runs_in_a_shell(init: Written, world: Path, tmp_path: Path) -> None:
    commands = init("a b.yaml", "--teacher", f"{world}/teacher", "--data", f"{world}/rows.jsonl")
    done = subprocess.run(["bash", "-c", commands[0]], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "pass  disk" in done.stdout


def test_a_base_model_and_data_without_answers(
    init: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher")
    (teacher / "chat_template.jinja").unlink()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(24)))
    commands = init("--teacher", "teacher", "--data", "rows.jsonl")
    config = load_config("run.yaml", (), PRESETS)
    assert (config.data.chat_template, config.sft.enabled) == (False, False)
    assert set(doctor(commands[0], capsys).values()) <= {"pass", "warn"}


def test_what_is_not_fetched_yet_is_the_first_command(init: Written) -> None:
    commands = init("--student-layers", "9")
    assert [command.split()[1:] for command in commands] == [
        ["models", "fetch", "smollm2-135m"],
        ["data", "fetch", "alpaca-demo"],
        ["doctor", "run.yaml"],
        ["train", "run.yaml"],
    ]
    config = load_config("run.yaml", (), PRESETS)
    assert (config.teacher.model, config.student.init.num_layers) == ("smollm2-135m", 9)
    assert (config.data.path, config.data.num_heldout) == ("alpaca-demo", 128)


def test_hub_ids_are_not_looked_up(init: Written) -> None:
    commands = init("--teacher", "owner/large", "--student", "owner/small", "--data", "owner/rows")
    assert [command.split()[1] for command in commands] == ["doctor", "train"]
    config = load_config("run.yaml", (), PRESETS)
    assert (config.teacher.model, config.student.model) == ("owner/large", "owner/small")
    assert config.data.path == "owner/rows"


@pytest.mark.parametrize(
    ("recipe", "student"), [*((name, []) for name in read_recipes()), ("ammd", ["--student", "owner/small"])]
)
def test_every_setting_has_a_comment_and_a_place_in_the_docs(
    init: Written, recipe: str, student: list[str]
) -> None:
    init("--teacher", "owner/large", *student, "--recipe", recipe)
    lines = Path("run.yaml").read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        commented = "  # " in line or line.strip().startswith("#") or above.strip().startswith("#")
        assert commented or line.endswith(":"), line
    settings = flatten(yaml.safe_load("\n".join(lines)))
    assert len(settings) <= 26
    for name in settings:
        assert name == "recipe" or f"| `{name}` |" in PAGE


def test_no_file_is_overwritten(complaint: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("precious")
    assert complaint() == "distill: run.yaml must not exist yet; give the name of a new file"
    assert (tmp_path / "run.yaml").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--teacher", "/no/model"], ["--teacher=/no/model must be a folder that exists"]),
        (["--teacher", "smollm2-135"], ["--teacher=smollm2-135", "did you mean smollm2-135m?"]),
        (["--student", "./none"], ["--student=/", "/none must be a folder that exists"]),
        (["--student", "."], ["--student=/", " must contain a checkpoint"]),
        (["--data", "none.jsonl"], ["--data=none.jsonl must be a file or folder that exists"]),
        (["--data", "some/none.jsonl"], ["--data=some/none.jsonl must be a file or folder that exists"]),
        (["--data", "alpaca-dem"], ["--data=alpaca-dem must be", "did you mean alpaca-demo?"]),
        (["--recipe", "amd"], ["recipe=amd must be one of", "did you mean ammd?"]),
    ],
)  # fmt: skip
def test_wrong_choice(complaint: Callable[..., str], arguments: list[str], parts: list[str]) -> None:
    line = complaint(*arguments)
    assert all(part in line for part in parts), line


def test_choices_are_checked_against_models_and_data(
    complaint: Callable[..., str], world: Path, tmp_path: Path
) -> None:
    line = complaint("--teacher", f"{world}/teacher", "--student-layers", "3")
    assert line == "distill: --student-layers=3 must be <= the teacher's 2; lower it"
    (tmp_path / "rows.jsonl").write_text('{"question": "who?"}\n')
    assert "must have a column messages or conversations" in complaint("--data", "rows.jsonl")


def test_the_help_gives_the_share_of_layers_that_is_kept(
    init: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    assert "default: two thirds of them" in " ".join(capsys.readouterr().out.split())
    save_tiny_llama(tmp_path / "teacher", num_layers=6)
    write_rows(tmp_path / "rows.jsonl")
    init("--teacher", "teacher", "--data", "rows.jsonl")
    assert load_config("run.yaml", (), PRESETS).student.init.num_layers == 4


def test_columns_are_named_as_the_remedy_says(
    init: Written, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"why {i}?", "reply": f"because {i}"} for i in range(24)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["c.yaml", "--data", "c.jsonl", "--teacher", f"{world}/teacher"]
    assert main(["init", *asked]) == 2
    assert "with data.prompt_column and data.answer_column" in capsys.readouterr().err
    commands = init(*asked, "data.prompt_column=question", "data.answer_column=reply")
    assert set(doctor(commands[0], capsys).values()) <= {"pass", "warn"}
    config = load_config("c.yaml", (), PRESETS)
    assert (config.data.prompt_column, config.data.answer_column) == ("question", "reply")
    assert (config.data.num_heldout, config.sft.enabled) == (6, True)


def test_settings_are_written_into_the_file(init: Written, world: Path) -> None:
    given = {
        "seed": 7, "run_dir": "a: b #c", "data.num_heldout": 5, "data.on_long_prompt": "error", "data.split": "007",
        "recipe.anchor_weight": 0.5, "recipe.gamma": 0.75, "student.init.select": "even", "rollout.num_threads": None,
        "evaluation.shown_prompts": ["a, b", "${x} 'c'"], "learner.learning_rate": 1e-5,
    }  # fmt: skip
    settings = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in given.items()
    ]
    options = ["--teacher", f"{world}/teacher", "--data", f"{world}/rows.jsonl"]
    init(*options, "plain.yaml")
    init(*settings[:2], *options, *settings[2:])
    plain, config = load_config("plain.yaml", (), PRESETS), load_config("run.yaml", (), PRESETS)
    assert flat_settings(config) == flat_settings(plain) | given | {
        "evaluation.num_prompts": 5, "evaluation.num_prompts_during": 5,
    }  # fmt: skip
    comments = [re.findall(r"# .*", Path(file).read_text()) for file in ("plain.yaml", "run.yaml")]
    assert set(comments[0]) <= {*comments[1]}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.path=a b", "data.path=a b must be chosen with --data; write --data 'a b' instead"),
        ("recipe=kd", "recipe=kd must be chosen with --recipe; write --recipe kd instead"),
        ("data.fromat=auto", "data.fromat must be the name of a setting; did you mean data.format?"),
        ("learner.num_updates=0", "learner.num_updates=0 must be >= 1; correct the value (the default is 20)"),
        ("sft={enabled: false}", "sft must be a setting, not a section, to be written into the file; "
                                 "give the settings of the section one by one"),
        ("more", "'more' must be name=value; for example learner.num_updates=40"),
    ],
)  # fmt: skip
def test_wrong_setting(complaint: Callable[..., str], setting: str, message: str) -> None:
    assert complaint(setting) == f"distill: {message}"


def test_student_and_its_layers_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["init", "--student", "owner/small", "--student-layers", "3"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_init_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from deploy.cli.main import main; main(['init', 'run.yaml']);"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert out.stdout.splitlines()[-1] == "[]"


def test_the_readme_goes_from_the_file_to_its_run(init: Written, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    (written,) = re.findall(r"distill (init .*?) *#", readme)
    write_rows(tmp_path / "my.jsonl")
    init(*written.split()[1:])
    run_dir = load_config("my.yaml", (), PRESETS).run_dir
    assert re.findall(r"distill (?:train --resume|report|chat) (\S+)", readme) == [
        run_dir,
        run_dir,
        run_dir,
        f"{run_dir}/student",
    ]
    assert re.findall(r"distill (?:doctor|train) (\w\S+)", readme) == ["my.yaml", "my.yaml"]
