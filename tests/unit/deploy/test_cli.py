"""Wrong requests: exit code 2 and one line with the remedy, before any engine starts."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deploy import PRESETS
from deploy.cli.main import main
from deploy.demo import demo
from deploy.run.record import PAGE, remove_results
from deploy.run.settings import keep_settings
from distill.config import RunConfig
from distill.config.tree import resume_fingerprint, to_yaml
from distill.errors import ConfigError
from distill.run.folder import RunFolder
from tests.tiny import save_tiny_llama, tiny_config, tiny_overrides, tiny_tokenizer
from tests.unit.deploy.run_folders import run_folder

Complaint = Callable[..., str]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def complaint(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Complaint:
    """A function that runs `distill train` with overrides and returns its one line on stderr."""

    def no_engine(*_: object) -> None:
        raise AssertionError("an engine was about to start")

    monkeypatch.setattr("deploy.run.context._backend", no_engine)

    def run(*overrides: str, arguments: list[str] | None = None) -> str:
        every = [*tiny_overrides(world), f"run_dir={tmp_path}/run", *overrides]
        code = main(arguments or ["train", str(world / "tiny.yaml"), *every])
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2, lines
        assert len(lines) == 1, lines
        return lines[0]

    return run


def test_missing_config_file(complaint: Complaint, tmp_path: Path) -> None:
    line = complaint(arguments=["train", str(tmp_path / "none.yaml")])
    assert "none.yaml" in line


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("lerner.num_updates=3", ["lerner", "learner"]),
        ("learner.num_update=3", ["learner.num_update", "learner.num_updates"]),
        ("learner.num_updates=many", ["learner.num_updates", "many"]),
        ("critic.features=ratios", ["critic.features", "ratio"]),
        ("recipe=amd", ["amd", "ammd"]),
        ("recipe.beta=1.5", ["recipe.beta=1.5", "[0, 1]"]),
        ("rollout.temperature=0.7", ["rollout.temperature must be the name of a setting; leave it out"]),
        ("replay.min_size_to_sample=100", ["replay.min_size_to_sample=100", "max_policy_age"]),
        ("teacher.model=/no/such/folder", ["teacher.model=/no/such/folder"]),
        ("teacher.model=smollm2-135", ["smollm2-135m"]),
        ("data.path=/no/rows.jsonl", ["/no/rows.jsonl"]),
        ("data.max_prompt_tokens=5", ["prompt", "data.max_prompt_tokens"]),
        ("data.max_prompt_tokens=4096", ["context", "512"]),
        ("data.num_heldout=1000", ["heldout"]),
        ("student.init.num_layers=9", ["student.init.num_layers=9", "2"]),
        ("replay.max_bytes=2000000", ["replay.m"]),
        ("critic.rank=65", ["critic.rank=65", "hidden size", "64"]),
        ("cluster.backend=in_process", ["rollout.engine=vllm", "transformers"]),
        (
            "data.max_reference_tokens=600",
            ["context", "512", "lower data.max_prompt_tokens or data.max_reference_tokens"],
        ),
        pytest.param(
            "learner.device=cuda",
            ["learner.device=cuda must be available", "auto"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (
            "learner.max_grad_norm=-1",
            ["learner.max_grad_norm=-1.0 must be > 0; correct the value (the default is 1.0)"],
        ),
    ],
)
def test_wrong_setting(complaint: Complaint, override: str, parts: list[str]) -> None:
    line = complaint(override)
    assert all(part in line for part in parts), line


def test_broken_line_of_data_is_named(complaint: Complaint, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(30)]
    rows[16] = '{"prompt": "p16", "completion": '
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(rows))
    line = complaint(f"data.path={path}")
    assert f"{path} line 17" in line


def test_empty_data_set(complaint: Complaint, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "at least one row" in complaint(f"data.path={tmp_path}/empty.jsonl")


def test_student_with_another_tokenizer(complaint: Complaint, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    line = complaint(f"student.model={other}", "student.init.from=null", "student.init.num_layers=null")
    assert "tokenizer" in line


def test_rank_above_the_smaller_hidden_size(complaint: Complaint, tmp_path: Path) -> None:
    narrow = save_tiny_llama(tmp_path / "narrow", hidden_size=32)
    student = [f"student.model={narrow}", "student.init.from=null", "student.init.num_layers=null"]
    assert "32; " in complaint(*student, "critic.features=both", "critic.rank=33")


def test_truncated_checkpoint(complaint: Complaint, tmp_path: Path) -> None:
    half = save_tiny_llama(tmp_path / "half")
    (file,) = half.glob("*.safetensors")
    whole = file.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for broken in (whole[:4], whole[:100], whole[:-1], pointer):
        file.write_bytes(broken)
        line = complaint(f"teacher.model={half}")
        assert "must contain whole safetensors files" in line and "again" in line


def test_impossible_run_folder(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The doctor finds it as well."""
    (tmp_path / "file").write_text("precious")
    for run_dir, part in (("file/run", "be a folder"), (".", "it contains file")):
        doctor = ["doctor", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={tmp_path}/{run_dir}"]
        assert main([*doctor, "--json"]) == 2
        last = json.loads(capsys.readouterr().out)["checks"][-1]
        assert last["status"] == "fail" and part in last["message"]


def test_impossible_study_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["study", str(PRESETS / "studies/tiny.yaml"), "--out", f"{tmp_path}/file/x"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "Not a directory" in line and "file/x" in line
    assert main(["study", str(PRESETS / "studies/tiny.yaml"), "--out", f"{tmp_path}/file"]) == 2
    assert "--out=" in (line := capsys.readouterr().err) and "must be a folder" in line


def test_study_prints_the_tables_of_committed_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ROOT / "docs/results/lead"
    assert main(["study", str(results / "results.json"), "--report"]) == 0
    assert capsys.readouterr().out.strip() == (results / "report.md").read_text().strip()
    assert main(["study", str(results / "results.json"), "--report", "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["study", str(tmp_path / "other.json"), "--report"]) == 2
    assert "must contain asked" in capsys.readouterr().err


def test_demo_checks_its_settings_before_it_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.demo.subprocess.run", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match=r"^sed must be the name of a setting; did you mean seed\?$"):
        demo(["sed=1"])
    with pytest.raises(
        ConfigError, match=r"^'--help' must be name=value; for example learner\.num_updates=40$"
    ):
        demo(["--help"])


def test_unknown_logit_transform(complaint: Complaint, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "frobnicator"}))
    line = complaint(f"teacher.model={other}")
    assert "frobnicator" in line


def test_doctor_warns_of_padded_vocabularies(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padded = save_tiny_llama(tmp_path / "padded", vocab_size=320)
    overrides = [f"student.model={padded}", "student.init.from=null", "student.init.num_layers=null"]
    arguments = ["doctor", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={tmp_path}/run"]
    assert main([*arguments, *overrides, "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["vocabulary"]["status"] == "warn"
    assert "first 258" in checks["vocabulary"]["message"]


def test_doctor_reports_every_check_and_a_remedy(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={tmp_path}/run"]
    assert main([*arguments, "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    names = [check["name"] for check in checks]
    assert {"tokenizers", "vocabulary", "payload", "memory", "buffer", "cluster", "disk"} <= set(names)
    assert all(check["status"] in ("pass", "warn") for check in checks)
    assert main([*arguments, "data.path=/no/rows.jsonl", "--json"]) == 2
    last = json.loads(capsys.readouterr().out)["checks"][-1]
    assert last["status"] == "fail" and last["remedy"]


def test_run_folder_with_another_configuration(complaint: Complaint, world: Path, tmp_path: Path) -> None:
    config = tiny_config(world, f"run_dir={tmp_path}/run", "seed=5")
    with RunFolder(config.run_dir) as folder:
        folder.create(to_yaml(config), resume_fingerprint(config))
        keep_settings(folder, config)
    line = complaint()
    assert "seed=0 must stay 5, as it was when the run in" in line
    assert complaint("seed=5", "sft.enabled=false").startswith("distill: sft.enabled=false must stay true")


def test_resume_and_report_without_a_run(complaint: Complaint, tmp_path: Path) -> None:
    for arguments in (["train", "--resume", f"{tmp_path}/none"], ["report", f"{tmp_path}/none"]):
        line = complaint(arguments=arguments)
        assert "none" in line and "run" in line


def test_a_report_of_a_run_that_has_only_begun(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(world, f"run_dir={tmp_path}/run")
    with RunFolder(config.run_dir) as folder:
        folder.create(to_yaml(config), resume_fingerprint(config))
    folder.summary.write_text('{"updates": ')
    assert main(["report", f"{tmp_path}/run"]) == 0
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert all(line.startswith("distill: ") for line in lines)
    (summary,) = [line for line in lines if "summary.json" in line]
    assert "summary.json cannot be read" in summary and "must be JSON" in summary and "--resume" in summary
    assert f"the whole report, for a browser: {tmp_path}/run/report.html" in shown.out
    assert (tmp_path / "run" / "report.html").is_file()
    assert main(["report", f"{tmp_path}/run", "--html", f"{tmp_path}/run/config.yaml"]) == 2
    assert "must end with .html" in capsys.readouterr().err
    assert main(["report", f"{tmp_path}/run", "--html", f"{tmp_path}/other/page.html"]) == 0
    assert (tmp_path / "other" / "page.html").is_file()


def test_a_finished_run_writes_its_page(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.run.train.train", lambda config, progress: run_folder(Path(config.run_dir)))
    train = ["train", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={tmp_path}/run"]
    assert main(train) == 0
    assert f"the whole report, for a browser: {tmp_path}/run/report.html" in capsys.readouterr().out
    assert "<h1>Run run</h1>" in (tmp_path / "run" / "report.html").read_text()
    with RunFolder(tmp_path / "run") as folder:
        folder._take_lock()
        remove_results(folder)  # a run that continues has no report of its end
        assert not (folder.path / PAGE).exists() and not folder.summary.exists()


def test_a_page_that_cannot_be_written_does_not_fail_the_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(config: RunConfig, progress: object) -> None:
        (run_folder(Path(config.run_dir)).path / PAGE).mkdir()

    monkeypatch.setattr("deploy.run.train.train", trained)
    train = ["train", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={tmp_path}/run"]
    assert main(train) == 0
    assert "report.html must be a file that can be written" in capsys.readouterr().err


def test_train_needs_a_configuration_or_a_run_to_resume(complaint: Complaint) -> None:
    assert "--resume" in complaint(arguments=["train"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from deploy.cli.main import parser; parser().format_help();"
        "print(sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["doctor", "train", "submit --address http://head:8265", "init"])
def test_settings_on_the_command_line_are_optional(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--unknown"])
    assert (
        "required: key=value" not in (complaint := capsys.readouterr().err) and ", key=value" not in complaint
    )
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"distill {project['version']}\n"


def test_doctor_separates_rule_and_remedy(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={tmp_path}/run"]
    assert main([*arguments, "recipe.beta=2", "--json"]) == 2
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert check == {
        "name": "configuration",
        "status": "fail",
        "message": "recipe.beta=2.0 must lie in [0, 1]",
        "remedy": "correct the value (the default is 0.25)",
    }


def test_tokenizer_error_without_text(complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    assert "must contain a tokenizer (OSError); save one in the model's folder" in complaint()


def test_run_folder_in_use_is_left_alone(complaint: Complaint, world: Path, tmp_path: Path) -> None:
    config = tiny_config(world, f"run_dir={tmp_path}/run")
    with RunFolder(config.run_dir) as folder:
        folder.create(to_yaml(config), resume_fingerprint(config))
        assert "must be used by one process at a time" in complaint()
        assert folder.read_failure() is None


def test_interrupt_before_the_run_exists_offers_no_resume(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deploy.run.preflight.Preflight.run", interrupt)
    arguments = ["train", str(world / "tiny.yaml"), *tiny_overrides(world), f"run_dir={tmp_path}/run"]
    assert main(arguments) == 130
    assert capsys.readouterr().err == "distill: interrupted\n"
