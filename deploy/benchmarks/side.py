"""One side of a comparison in a process of its own, which lives for all rounds of a benchmark.

vLLM reads its environment when it is imported and keeps memory until its process ends, so two engines that are
compared never share a process. The parent sends a line of JSON for each call, and the process answers with one.
Both travel over pipes of their own, because the libraries print to stdout.

    python -m deploy.benchmarks.side MODULE:CLASS SETTINGS READ_FD WRITE_FD
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, Self

from deploy.benchmarks.harness import BenchmarkFailed
from deploy.cluster.memory import MemorySampler
from distill.errors import NO_VALUE, first_line

_PROJECT = str(Path(__file__).parents[2])
_CLOSE_S = 60.0
"""How long a side may take to end its engine."""


class Engine(Protocol):
    """What runs in the process. Further coroutine methods can be called by name, with JSON arguments and results."""

    @classmethod
    async def start(cls, **settings: Any) -> Self: ...

    async def close(self) -> None: ...


class Side:
    """The parent's end of the process; a context manager that ends it."""

    def __init__(
        self,
        name: str,
        target: str,
        settings: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
    ) -> None:
        """Start the process and wait until its engine runs.

        ``name``: for messages. ``target``: module:class of an :class:`Engine`. ``settings``: JSON.
        ``environment``: variables that the process has beside those of this one. ``python``: the interpreter of a
        peer's environment, which finds this project by its folder; None for this one.

        Raises: BenchmarkFailed.
        """
        self.name = name
        commands, self._to_child = os.pipe()
        self._from_child, results = os.pipe()
        self._process = subprocess.Popen(
            [
                str(python or sys.executable),
                "-m",
                __name__,
                target,
                json.dumps(dict(settings)),
                str(commands),
                str(results),
            ],
            pass_fds=(commands, results),
            stdin=subprocess.DEVNULL,
            stdout=2,  # stderr: stdout belongs to the result
            env={**os.environ, **(environment or {}), **({"PYTHONPATH": _PROJECT} if python else {})},
            start_new_session=True,  # Ctrl-C reaches the parent only, which then closes the pipe
        )
        os.close(commands)
        os.close(results)
        self._commands: IO[str] = os.fdopen(self._to_child, "w")
        self._results: IO[str] = os.fdopen(self._from_child)
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method of the engine; returns its result.

        Raises: BenchmarkFailed with the first line of what the method raised; its traceback is on stderr.
        """
        self._commands.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
        self._commands.flush()
        return self._answer()

    def pss_bytes(self) -> int:
        """Memory of the process and its children, with shared pages counted once (proportional set size)."""
        return MemorySampler({self.name: self._process.pid}).sample()[self.name]

    def close(self) -> None:
        """End the engine, then the process; kills it when it takes too long."""
        with suppress(OSError):
            self._commands.close()
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._results.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        line = self._results.readline()
        if not line:
            raise BenchmarkFailed(
                f"process of {self.name}", NO_VALUE, "live; it has ended", "read its output above"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkFailed(
                self.name, NO_VALUE, f"succeed ({answer['error']})", "read its output above"
            )
        return answer["result"]


async def _serve(target: str, settings: Mapping[str, Any], commands: IO[str], results: IO[str]) -> None:
    """Answer calls until the parent closes the pipe or dies."""

    def send(answer: Mapping[str, Any]) -> None:
        results.write(json.dumps(answer) + "\n")
        results.flush()

    module, _, name = target.partition(":")
    try:
        engine = await getattr(importlib.import_module(module), name).start(**settings)
    except Exception as error:
        traceback.print_exc()
        send({"error": first_line(error)})
        return
    try:
        send({"result": None})
        while line := await asyncio.to_thread(commands.readline):
            call = json.loads(line)
            try:
                answer = {"result": await getattr(engine, call["method"])(**call["arguments"])}
            except Exception as error:
                traceback.print_exc()
                answer = {"error": first_line(error)}
            send(answer)
    finally:
        await engine.close()


def main() -> None:
    target, settings, commands, results = sys.argv[1:]
    with (
        suppress(BrokenPipeError),  # the parent has died
        os.fdopen(int(commands)) as read,
        os.fdopen(int(results), "w") as write,
    ):
        asyncio.run(_serve(target, json.loads(settings), read, write))


if __name__ == "__main__":
    main()
