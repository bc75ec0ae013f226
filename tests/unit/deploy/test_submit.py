"""`distill submit` up to the request: files, arguments, addresses, exit codes."""

from __future__ import annotations

import io
import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deploy.cli.main import main
from deploy.submit.archive import PACKAGES, require_size, with_package, working_files, write_archive
from deploy.submit.server import JobServer, _Printed, exit_code_of, normalized
from deploy.submit.submit import Request, contents
from deploy.version import versions
from distill.errors import ConfigError

ROOT = Path(__file__).parents[3]
SETTINGS = "recipe: ammd\nstudent: {init: {from: teacher, num_layers: 2}}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a configuration, data, and what must not be uploaded."""
    root = tmp_path / "project"
    for name in (
        "my.yaml", "rows.jsonl", "models/teacher/config.json", ".git/HEAD", ".venv/lib/big.so", "runs/a/run.json",
        "sub/runs/kept.txt", "sub/__pycache__/x.pyc", "secret.env", "sub/cache/x", "sub/.gitignore",
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (root / ".gitignore").write_text("*.env\n")
    (root / "sub" / ".gitignore").write_text("cache/\n")
    (root / "my.yaml").write_text(SETTINGS + "data: {path: rows.jsonl}\nrun_dir: /shared/run\n")
    (root / "link").symlink_to(root / "models", target_is_directory=True)
    monkeypatch.chdir(root)
    return root


def request(*overrides: str, config: str = "my.yaml", resume: str | None = None) -> Request:
    return Request(config=None if resume else Path(config), resume=resume, overrides=overrides)


def refusal(project: Path, *overrides: str, **options: str) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        contents(request(*overrides, **options), project)
    assert error.value.remedy
    return error.value


def test_ignored_files_and_environments_stay_here(project: Path):
    expected = {".gitignore", "my.yaml", "rows.jsonl", "models/teacher/config.json", "sub/.gitignore", "sub/runs/kept.txt"}  # fmt: skip
    assert set(working_files(project)) == expected


def test_the_package_comes_along_unless_it_is_there(project: Path):
    files = with_package(working_files(project), project)
    assert "deploy/cli/__main__.py" in files and "deploy/configs/recipes/ammd.yaml" in files
    assert not [name for name in files if name.endswith(".pyc")]
    assert with_package({}, ROOT) == {}
    (project / "deploy").mkdir()
    (project / "deploy" / "x.py").touch()
    with pytest.raises(ConfigError, match="must contain no folder deploy"):
        with_package(working_files(project), project)


def test_the_projects_own_folder_uploads_what_it_needs():
    files = working_files(ROOT)
    assert {"deploy/cli/__main__.py", "distill/schema.py", "deploy/configs/demo.yaml"} <= set(files)
    assert not [name for name in files if name.startswith((".git/", ".venv", "runs/")) or ".pyc" in name]


def test_equal_files_make_equal_archives(project: Path, tmp_path: Path):
    archives = []
    for number in range(2):
        (project / "rows.jsonl").write_text("y")
        write_archive(working_files(project), tmp_path / f"{number}.zip")
        archives.append((tmp_path / f"{number}.zip").read_bytes())
    assert archives[0] == archives[1]
    assert zipfile.ZipFile(tmp_path / "0.zip").read("rows.jsonl") == b"y"


def test_a_working_directory_over_the_limit_is_refused_with_its_largest_folders(project: Path):
    (project / "models" / "teacher" / "model.safetensors").write_bytes(bytes(3 << 20))
    (project / "rows.jsonl").write_bytes(bytes(1 << 20))
    files = working_files(project)
    assert require_size(files, project, 5 << 20) > 4 << 20
    with pytest.raises(ConfigError) as error:
        require_size(files, project, 4 << 20)
    line = str(error.value)
    assert "must be smaller than 4.0 MiB, Ray's limit; it has 4.0 MiB" in line
    assert "(models 3.0 MiB, rows.jsonl 1.0 MiB, " in line and ".rayignore" in line


def test_a_configuration_becomes_the_arguments_of_train(project: Path, tmp_path: Path):
    files, arguments = contents(request("seed=3"), project)
    assert arguments == ["my.yaml", "seed=3"]
    assert files["my.yaml"] == project / "my.yaml"
    (tmp_path / "other.yaml").write_text(SETTINGS + "run_dir: ~/run\n")
    files, arguments = contents(request(config=str(tmp_path / "other.yaml")), project)
    assert arguments == ["submitted/other.yaml"]
    assert files["submitted/other.yaml"] == tmp_path / "other.yaml"


def test_a_run_on_the_cluster_is_resumed_by_its_absolute_path(project: Path):
    _, arguments = contents(request("learner.num_updates=9", resume="/shared/run"), project)
    assert arguments == ["--resume", "/shared/run", "learner.num_updates=9"]
    assert str(refusal(project, resume="runs/a")).startswith("--resume=runs/a must be an absolute path")


def test_a_wrong_setting_is_refused_before_anything_is_sent(project: Path):
    assert "learner.num_updates=0" in str(refusal(project, "learner.num_updates=0"))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("run_dir=runs/x", "absolute path on the cluster"),
        ("data.path=../rows.jsonl", "it does not exist here either"),
        ("data.path=none.jsonl", "it does not exist here either"),
        ("data.path=../project", "outside the working directory"),
        ("data.path=..", "outside the working directory"),
        ("data.path=secret.env", "leaves it out"),
        ("teacher.model=runs/a", "leaves it out"),
        ("teacher.model=./models/none", "it does not exist here either"),
        ("teacher.model=link/teacher", "leaves it out"),
        ("teacher.model=models/teacher", ""),
        ("teacher.model=smollm2-135m", ""),
        ("teacher.model=owner/name", ""),
        ("data.path=/on/the/cluster.jsonl", ""),
        ("data.path=*.jsonl", ""),
    ],
)
def test_relative_paths_are_uploaded_or_refused(project: Path, override: str, reason: str):
    if not reason:
        contents(request(override), project)
        return
    error = refusal(project, override)
    assert str(error).startswith(override) and reason in str(error)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("head", "http://head:8265"),
        ("head:99", "http://head:99"),
        ("https://head", "https://head:8265"),
        ("http://[::1]:1/", "http://[::1]:1"),
    ],
)
def test_addresses_of_job_servers(given: str, expected: str):
    assert normalized(given) == expected


@pytest.mark.parametrize("wrong", ["ray://head:10001", "http://", "head:port", ""])
def test_what_is_no_address_of_a_job_server_is_refused(wrong: str):
    with pytest.raises(ConfigError, match="must be the http address of a Ray head's dashboard"):
        normalized(wrong)


class Answers(BaseHTTPRequestHandler):
    """Answers every request with the text that its server has."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.text.encode())  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def http() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_another_version_of_ray_is_refused_with_both(http: HTTPServer):
    http.text = json.dumps({"ray_version": "2.9.0"})  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as error:
        JobServer(f"127.0.0.1:{http.server_port}")
    assert f"run Ray {versions()['Ray']} as this machine does (the cluster runs Ray 2.9.0)" in str(
        error.value
    )


def test_another_server_is_refused(http: HTTPServer):
    http.text = "hello"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="something listens there, but it is not a Ray job server"):
        JobServer(f"127.0.0.1:{http.server_port}")


def test_a_closed_port_ends_the_command(project: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert main(["submit", "my.yaml", "--address", f"127.0.0.1:{closed}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "within 5 s (Connection refused); check that `ray start --head` runs there" in line


def test_overrides_may_come_after_options(project: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    arguments = ["submit", "my.yaml", "--address", f"127.0.0.1:{closed}", "seed=3"]
    assert main(arguments) == 2
    assert "Connection refused" in capsys.readouterr().err
    for wrong in ("other.yaml", "--seed=3"):
        with pytest.raises(SystemExit):
            main([*arguments, wrong])
        assert f"unrecognized arguments: seed=3 {wrong}" in capsys.readouterr().err


def test_exit_codes_of_jobs():
    assert exit_code_of("SUCCEEDED", 0) == 0
    assert exit_code_of("STOPPED", None) == 130
    assert [exit_code_of("FAILED", code) for code in (1, 2, 130, None, -9)] == [1, 2, 130, 1, 1]


def test_a_log_that_begins_again_is_printed_once():
    out = io.StringIO()
    printed = _Printed(out)
    for chunk in ("one\ntw", "o\n"):
        printed.more(chunk)
    printed.restart()
    for chunk in ("one\n", "two\nthr", "ee\n"):
        printed.more(chunk)
    printed.complete("one\ntwo\nthree\nfour\n")
    assert out.getvalue() == "one\ntwo\nthree\nfour\n"


def test_packages_are_those_of_the_project():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found == set(PACKAGES)
