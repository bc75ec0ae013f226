"""The completion scripts: shells accept them, and a real bash completes with one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.cli.commands import SHELLS
from deploy.cli.main import main, parser

_COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
function=$(complete -p distill); function=${function#*-F }; function=${function%% *}
"$function" distill "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / shell
    path.write_text(capsys.readouterr().out)
    return path


def completed(path: Path, *words: str) -> set[str]:
    """What bash offers for the last word."""
    command = ["bash", "--norc", "-c", _COMPLETE, "bash", str(path), "distill", *words]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return {line.strip() for line in done.stdout.splitlines() if line.strip()}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_accepts_the_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = script(shell, tmp_path, capsys)
    assert all(name in path.read_text() for name in ("train", "resume", "ammd"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install -y {shell}")
    subprocess.run([shell, "-n", str(path)], check=True, timeout=60)


def test_a_real_bash_completes_commands_options_names_and_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = script("bash", tmp_path, capsys)
    (tmp_path / "my.yaml").touch()
    (tmp_path / "runs").mkdir()
    assert completed(path, "re") == {"recipes", "replay-batch", "report"}
    assert completed(path, "report", "runs", "--co") == {"--compare"}
    assert completed(path, "train", "--resume", "ru") == {"runs"}
    assert completed(path, "train", "my") == {"my.yaml"}
    assert completed(path, "init", "--recipe", "ammd_p") == {"ammd_paper"}
    assert completed(path, "recipes", "tri") == {"triangular"}
    assert completed(path, "bench", "roll") == {"rollout"}
    assert completed(path, "models", "fetch", "smollm2-135m") == {"smollm2-135m"}


def test_every_command_is_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = script("bash", tmp_path, capsys)
    (commands,) = [action for action in parser()._actions if action.dest == "command"]
    assert commands.choices is not None
    assert completed(path, "") >= set(commands.choices)
