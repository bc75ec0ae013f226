"""Train, and be killed at every durable write: once just before the new file or folder has its name, and once just after.

    python -m tests.chaos.write_points RUN CONFIG [SETTING ...]

Each attempt is a process that kills itself at the first write which no attempt before was killed at. The next one resumes
the run, or starts it again if the run does not exist yet. The last attempt is one that ends. The program prints one line of
JSON: the writes at which attempts were killed. All files and folders of the project are written through
:mod:`distill.files`, so a write that is added later is met without a change here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # the attempts are forks, and need not import it again
import transformers  # noqa: F401

import deploy.cli.main
import deploy.run.train
import distill.files
import learner.process.worker  # noqa: F401

_MOST_ATTEMPTS = 200


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    root = options.run.parent
    done: list[list[str]] = []
    for _ in range(_MOST_ATTEMPTS):
        resumes = (options.run / "run.json").exists()
        again = ["--resume", str(options.run)]
        arguments = again if resumes else [options.config, f"run_dir={options.run}", *options.settings]
        status, killed_at = _attempt(["train", *arguments], root, done)
        if killed_at is None:
            print(json.dumps(done))
            return os.waitstatus_to_exitcode(status)
        done.append(killed_at)
    print(f"the run has not ended after {_MOST_ATTEMPTS} attempts", file=sys.stderr)
    return 3


def _attempt(arguments: list[str], root: Path, done: list[list[str]]) -> tuple[int, list[str] | None]:
    """Run the program in a fork; returns its wait status, and the write and moment at which it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _Killer(root, done, writer).install()
        os._exit(deploy.cli.main.main(arguments))
    os.close(writer)
    with os.fdopen(reader) as report:
        killed_at = report.read()
    _, status = os.waitpid(child, 0)
    return status, json.loads(killed_at) if killed_at else None


class _Killer:
    """Kills its process at the first write that is not in a list."""

    def __init__(self, root: Path, done: list[list[str]], report: int) -> None:
        self._root = root
        self._done = done
        self._report = report

    def install(self) -> None:
        for owner, name in ((os, "replace"), (Path, "rename"), (distill.files, "_exchange")):
            setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, rename: Callable[..., Any]) -> Callable[..., Any]:
        def watched(made: Any, place: Any) -> Any:
            self._kill_if_new(place, "before")
            result = rename(made, place)
            self._kill_if_new(place, "after")
            return result

        return watched

    def _kill_if_new(self, place: str | Path, moment: str) -> None:
        path = Path(place)
        if not path.is_relative_to(self._root):  # a library's own files, or weights in shared memory
            return
        # The number of a step and the name of a corpus do not make another kind of write.
        name = re.sub(r"[0-9a-f]{12,}|\d+", "*", str(path.relative_to(self._root)))
        if [name, moment] not in self._done:
            os.write(self._report, json.dumps([name, moment]).encode())
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
