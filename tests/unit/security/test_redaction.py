"""No credential reaches a terminal, a run folder, a report or the environment of an actor."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from deploy.cluster.ray_cluster import actor_environment
from deploy.exits import complain
from deploy.report.html import html
from deploy.report.model import Listing, Page, Paragraph, Report, Section
from deploy.report.terminal import print_report
from deploy.run.progress import Progress
from deploy.submit.server import JobServer
from distill.config.load import load_config
from distill.errors import ConfigError
from distill.redaction import contains_credentials, is_secret_name, redacted
from distill.run.folder import RunFolder
from distill.run.metrics import EventLog

TOKEN = "hf_0123456789abcdefABCDEF"
SECRET = "open sesame, please"
MESSAGE = f"401 for {TOKEN} at https://me:{SECRET.split(',')[0].replace(' ', '')}@host/x with {SECRET}"
CUT = ["student.init.from=teacher", "student.init.num_layers=1"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


def clean(text: str) -> bool:
    return TOKEN not in text and SECRET not in text and "opensesame" not in text and "***" in text


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME",
     "RAY_AUTH_TOKEN", "GITHUB_TOKEN", "PGPASSWORD_SECRET", "my_passphrase"],
)  # fmt: skip
def test_names_of_secrets(name: str):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "TOKENIZERS_PARALLELISM",
        "RAY_AUTH_TOKEN_PATH",
        "SSH_KEY_FILE",
        "PWD",
        "MONKEY",
        "KEYBOARD",
        "USERNAME",
    ],
)
def test_names_of_other_variables(name: str):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("s3://key:secret@bucket", "s3://***@bucket"),
        ("GET /x?token=abc&page=2", "GET /x?token=***&page=2"),
        ("Authorization: Bearer abcdefgh123", "Authorization: Bearer ***"),
        ("token hf_abcdefghijklmnopqrst", "token ***"),
        (
            "none of it: a@b.org, data/x@y.json, https://host/a@b",
            "none of it: a@b.org, data/x@y.json, https://host/a@b",
        ),
    ],
)
def test_forms_of_credentials(text: str, shown: str):
    assert redacted(text, {}) == shown
    assert redacted(shown, {}) == shown


def test_values_of_the_environment():
    secrets = {"A_TOKEN": "abcdef", "B_TOKEN": "abcdefgh", "C_TOKEN": "none", "PLAIN": "visible"}
    assert redacted("abcdefgh abcdef none visible", secrets) == "*** *** none visible"


def test_an_error_line_and_live_lines(capsys: pytest.CaptureFixture[str]):
    complain(MESSAGE)
    assert clean(capsys.readouterr().err)
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=300)) as progress:
        progress.say(MESSAGE)
        progress.show(MESSAGE)
    assert clean(out.getvalue())


def test_what_a_run_folder_keeps(tmp_path: Path):
    folder = RunFolder(tmp_path)
    log = EventLog(tmp_path)
    log.write("tracker_failed", reason=MESSAGE, more=[{"deep": MESSAGE}])
    log.close()
    try:
        raise ConfigError("model", TOKEN, MESSAGE) from OSError(MESSAGE)
    except ConfigError as error:
        folder.write_failure(error)
    for path in (folder.events, folder.failure, folder.traceback):
        assert clean(path.read_text()), path
    assert json.loads(folder.failure.read_text())["value"] == "***"


def test_what_a_report_shows():
    page = Page(
        MESSAGE, (MESSAGE,), (Section("s", (Listing("config.yaml", MESSAGE), Paragraph((MESSAGE,)))),)
    )
    assert clean(html(page))
    out = io.StringIO()
    print_report(Report(MESSAGE, (Paragraph((MESSAGE,)),)), Console(file=out))
    assert clean(out.getvalue())


@pytest.mark.parametrize(
    "name", ["data.path", "teacher.model", "run_dir", "tracking.project", "teacher.revision"]
)
@pytest.mark.parametrize(
    "value", ["https://me:sesame123@host/x", "s3://k:sesame123@b", "hf_sesame123sesame123s"]
)
def test_a_setting_with_a_credential_is_refused_and_not_repeated(name: str, value: str):
    """It would be in config.yaml, settings.json, the report and every tracker."""
    with pytest.raises(ConfigError) as error:
        load_config(None, [*CUT, f"{name}={value}"])
    assert str(error.value).startswith(f"{name}=") and "must contain no password or token; put" in str(
        error.value
    )
    assert "sesame123" not in str(error.value)


def test_a_prompt_may_contain_an_address():
    text = "What is wrong with https://me:pass@host?"
    assert contains_credentials(text)
    config = load_config(
        None, [*CUT, f'evaluation.shown_prompts=["{text}"]', "data.path=s3://bucket/x.jsonl"]
    )
    assert config.evaluation.shown_prompts == [text]


def test_actors_and_jobs_get_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Ray keeps a runtime environment in its state, and shows it on its dashboard."""
    assert TOKEN not in str(actor_environment(1)) and SECRET not in str(actor_environment(1))
    sent = {}

    class Client:
        def submit_job(self, **request: object) -> str:
            sent.update(request)
            return "job"

    server = JobServer.__new__(JobServer)
    server._client = Client()  # pyright: ignore[reportAttributeAccessIssue]
    server.submit("python x", tmp_path / "job.zip", {"A": "b"})
    assert sent["runtime_env"] == {"working_dir": str(tmp_path / "job.zip"), "env_vars": {"A": "b"}}
