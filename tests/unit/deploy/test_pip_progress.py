"""The progress of pip, with the real pip and a package index on loopback."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import live_line, pip_progress
from deploy.pip_progress import PipTimeout, _Progress, main, run_pip
from tests.pip_index import make_wheel, package_index

LARGE = 3_000_000


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The arguments of a pip download of two packages; the second takes two seconds."""
    (tmp_path / "index").mkdir()
    make_wheel(tmp_path / "index", "small")
    make_wheel(tmp_path / "index", "large_one", LARGE)
    (tmp_path / "list.txt").write_text("# two packages\nsmall==1.0\nlarge_one==1.0\n")
    with package_index(tmp_path / "index", seconds=2.0) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield ["download", "--no-deps", "-d", str(tmp_path / "out"), "-r", str(tmp_path / "list.txt")]


def on_a_terminal(
    command: list[str], environment: dict[str, str] | None = None, cwd: Path | None = None
) -> tuple[int, str]:
    """The exit code of a command, and what it writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment, cwd=cwd)
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    return process.wait(), written.decode()


def test_bar_on_a_terminal(requirements: list[str], tmp_path: Path) -> None:
    code, written = on_a_terminal([sys.executable, "-m", "deploy.pip_progress", *requirements])
    assert code == 0, written
    frame = r"\[#+\.*\] +(\d+)%  \d+:\d\d  downloading large-one \(2 of 2\), (\d\.\d) of 3\.0 MB"
    frames = re.findall(frame, written)
    shares, megabytes = [int(share) for share, _ in frames], [float(size) for _, size in frames]
    assert len(set(megabytes)) >= 4 and megabytes == sorted(megabytes)
    assert all(
        abs(share - (50 + 50 * size / 3.0)) <= 2 for share, size in zip(shares, megabytes, strict=True)
    )
    assert "\n" not in written and written.endswith("\r")
    assert set(written.split("\r")[-2]) == {" "}  # the line is erased
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_plain_lines_elsewhere(
    requirements: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_line, "PLAIN_INTERVAL_S", 0.4)
    assert main(requirements) == 0
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if "large-one" in line]
    assert len(lines) >= 2
    for line in lines:
        assert re.fullmatch(r"downloading large-one \(2 of 2\), \d\.\d of 3\.0 MB: \d+%, \d+:\d\d", line)
    assert "\r" not in out and err == ""


def test_a_short_task_writes_nothing_to_a_log(
    requirements: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(requirements) == 0
    assert capfd.readouterr() == ("", "")


def test_errors_of_pip_appear(
    requirements: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("small==1.0\nmissing==1.0\n")
    assert main(requirements) == 1
    out, err = capfd.readouterr()
    assert out == "" and "ERROR: No matching distribution found for missing==1.0" in err


def test_pip_that_takes_too_long_is_stopped(requirements: list[str]) -> None:
    with pytest.raises(PipTimeout):
        run_pip(requirements, 2, timeout_s=0.5)
    assert not Path(requirements[3], "large_one-1.0-py3-none-any.whl").exists()


def test_interrupt_ends_pip_and_the_script_that_waits_for_it(
    requirements: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    script = 'if ! "$@"; then echo "went on"; fi; echo "went on"'
    command = ["bash", "-c", script, "-", sys.executable, "-m", "deploy.pip_progress", *requirements]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    while not list((tmp_path / "temporary").glob("*/*/large_one-*")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGINT, "", "")
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "out" / "large_one-1.0-py3-none-any.whl").exists()


def test_lines_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of pip 23.2 and 25.1: archives count once, whether they come from an index, a cache or a disk."""
    monkeypatch.setattr(pip_progress, "_SITE_PACKAGES", tmp_path / "site-packages")
    (tmp_path / "pip-unpack-1").mkdir()
    wheel = tmp_path / "pip-unpack-1" / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl"
    progress = _Progress(5, tmp_path)

    def after(*lines: str) -> tuple[str, float | None]:
        for line in lines:
            progress.read(line)
        text, share = progress.state()
        return text, share if share is None else round(share, 3)

    assert after("Looking in indexes: https://a/simple") == ("starting pip", 0.0)
    assert after(
        "Requirement already satisfied: six==1.17.0 in ./site-packages (1.17.0)",
        "Collecting rich==15.0.0 (from -r cpu.txt (line 2))",
        "Obtaining dependency information for rich==15.0.0 from https://a/rich-15.0.0-py3-none-any.whl.metadata",
        "Downloading rich-15.0.0-py3-none-any.whl.metadata (18 kB)",
        "Using cached rich-15.0.0-py3-none-any.whl (243 kB)",
    ) == ("downloading rich (2 of 5)", 0.4)
    assert after("Downloading https://a/whl/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (191.8 MB)") == (
        "downloading torch (3 of 5), 0.0 of 191.8 MB", 0.4,
    )  # fmt: skip
    wheel.write_bytes(bytes(95_900_000))
    assert after() == ("downloading torch (3 of 5), 95.9 of 191.8 MB", 0.5)
    assert after(
        "Processing ./wheels/xxhash-4.1.0-cp311-cp311-linux_x86_64.whl (from -r cpu.txt (line 4))"
    ) == ("downloading xxhash (4 of 5)", 0.8)
    assert after("Downloading rouge_score-0.1.2.tar.gz (17 kB)", "Preparing metadata (setup.py): started")[
        0
    ].startswith("Preparing metadata (setup.py) (5 of 5)")
    installed = tmp_path / "site-packages" / "old-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "INSTALLER").write_text("pip")
    assert after("Installing collected packages: rich, torch, rouge-score") == (
        "installing rich (1 of 3)",
        0.0,
    )
    installed.rename(
        installed.with_name("rich-15.0.0.dist-info")
    )  # a replaced package does not count as a new one
    assert after() == ("installing rich (1 of 3)", 0.0)
    for name, share in (("torch", 0.333), ("rouge-score", 0.667), ("rouge-score", 0.667)):
        folder = (
            tmp_path / "site-packages" / f"new{len(list((tmp_path / 'site-packages').iterdir()))}.dist-info"
        )
        folder.mkdir()
        (folder / "INSTALLER").write_text("pip")
        number = min(len(list((tmp_path / "site-packages").iterdir())), 3)
        assert after() == (f"installing {name} ({number} of 3)", share)


def test_the_state_is_whole_while_lines_are_read(tmp_path: Path) -> None:
    """The line is drawn by a thread of its own: it must not combine one package's name with another's size."""
    progress, ended, states = _Progress(10**9, tmp_path), threading.Event(), set()

    def read() -> None:
        while not ended.is_set():
            progress.read("Downloading large-1.0-py3-none-any.whl (5.0 MB)")
            progress.read("Using cached small-1.0-py3-none-any.whl (2.0 MB)")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=read)
    thread.start()
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            states.add(re.sub(r" \(.*\)", "", progress.state().text))
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(interval)
    states.discard("starting pip")
    assert states == {"downloading large, 0.0 of 5.0 MB", "downloading small"}
