"""The job server of a Ray cluster: its address, its version, and the life of a job there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from deploy.cluster.address import CONNECT_TIMEOUT_S, NEEDS_TOKEN, TOKEN_REMEDY, refusal_of
from deploy.exits import DONE, INTERRUPTED
from deploy.safe_text import one_line, strip_control
from deploy.version import versions
from distill.errors import NO_VALUE, ConfigError, DistillError, first_line

DEFAULT_PORT = 8265
_ANSWER_TIMEOUT_S = 15.0
"""How long a server may take for its version."""
_POLL_S = 1.0
_LOGS_AFTER_END_S = 5.0
"""How long the stream of a job's logs may go on after the job has ended."""
_LOST_AFTER_S = 60.0
"""How long a server may be silent while a job is followed."""
_MUST = "be the http address of a Ray head's dashboard, such as http://10.0.0.1:8265"
_REMEDY = (
    "check that `ray start --head` runs there with --dashboard-host, and that its port is open from here"
)


class SubmissionFailed(DistillError, RuntimeError):
    """A job server that refused a request, or that was lost."""

    code = "submit"


class JobServer:
    """The job server at an address, which has answered with this machine's version of Ray."""

    def __init__(self, address: str) -> None:
        """Raises: ConfigError when the address is wrong, nothing answers in time, or Ray has another version."""
        self.address = normalized(address)
        _connect(address, self.address)
        _require_version(address, self.address)
        # Ray prefers these variables to the address that it is given.
        for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(variable, None)
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.ERROR)
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("ray."):
                logging.getLogger(name).setLevel(logging.ERROR)
        self._client = JobSubmissionClient(self.address)

    def submit(self, command: str, archive: Path, environment: Mapping[str, str]) -> str:
        """Upload an archive and start a command in it; returns the job's id. Raises: SubmissionFailed."""
        runtime_env = {"working_dir": str(archive), "env_vars": dict(environment)}
        try:
            return self._client.submit_job(entrypoint=command, runtime_env=runtime_env)
        except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
            must = f"accept the job; it answered: {first_line(error)}"
            raise SubmissionFailed(self.address, NO_VALUE, must) from error

    def follow(self, job: str, out: TextIO = sys.stdout) -> int:
        """Print a job's logs until it ends; returns its exit code.

        Raises: SubmissionFailed when the server is lost.
        """
        printed = _Printed(out)
        asyncio.run(self._stream(job, printed))
        with contextlib.suppress(RuntimeError, OSError):
            printed.complete(self._client.get_job_logs(job))
        info: Any = self._client.get_job_info(job)
        code = exit_code_of(str(info.status), info.driver_exit_code)
        if info.driver_exit_code is None and code not in (DONE, INTERRUPTED):
            out.write(
                f"{one_line(first_line(RuntimeError(info.message or 'the job failed without a message')))}\n"
            )
        return code

    async def _stream(self, job: str, printed: _Printed) -> None:
        """Print the logs while the job runs. The stream ends early when a connection breaks, and is opened again."""
        heard = time.monotonic()
        tail: asyncio.Task[None] | None = None
        while True:
            if tail is None or tail.done():
                tail = asyncio.create_task(self._tail(job, printed))
            await asyncio.wait([tail], timeout=_POLL_S)
            try:
                status: Any = await asyncio.to_thread(self._client.get_job_status, job)
                heard = time.monotonic()
            except (RuntimeError, OSError) as error:
                if time.monotonic() - heard > _LOST_AFTER_S:
                    must = f"answer while the job is followed; {first_line(error)}"
                    remedy = "follow it again with `ray job logs --follow`, because the job may go on"
                    raise SubmissionFailed(self.address, NO_VALUE, must, remedy) from error
                await asyncio.sleep(_POLL_S)
                continue
            if status.is_terminal():
                await asyncio.wait([tail], timeout=_LOGS_AFTER_END_S)
                tail.cancel()
                return
            if tail.done():
                await asyncio.sleep(_POLL_S)

    async def _tail(self, job: str, printed: _Printed) -> None:
        printed.restart()
        with contextlib.suppress(RuntimeError, OSError):  # aiohttp's errors of connections are OSErrors
            async for text in self._client.tail_job_logs(job):
                printed.more(text)


class _Printed:
    """Prints a log of which the beginning can come again."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._num_printed = self._num_seen = 0

    def restart(self) -> None:
        """The log comes from its beginning."""
        self._num_seen = 0

    def more(self, text: str) -> None:
        start = max(0, self._num_printed - self._num_seen)
        self._num_seen += len(text)
        if new := text[start:]:
            self._num_printed += len(new)
            self._out.write(strip_control(new))
            self._out.flush()

    def complete(self, log: str) -> None:
        """Print what is left of the whole log."""
        self.restart()
        self.more(log)


def exit_code_of(status: str, driver_exit_code: int | None) -> int:
    """The exit code of a command that followed a job to its end."""
    if status == "STOPPED":
        return INTERRUPTED
    if status == "SUCCEEDED":
        return DONE
    return driver_exit_code if driver_exit_code is not None and driver_exit_code > 0 else 1


def normalized(address: str) -> str:
    """An address with its scheme and port: ``head`` is ``http://head:8265``. Raises: ConfigError."""
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError:
        port = None
    if parts.scheme not in ("http", "https") or not parts.hostname or port is None:
        remedy = "give the dashboard's address, which `ray start --head` prints"
        raise ConfigError("--address", address, _MUST, remedy)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}"


def _connect(given: str, address: str) -> None:
    parts = urlsplit(address)
    assert parts.hostname is not None and parts.port is not None
    if reason := refusal_of(parts.hostname, parts.port):
        must = f"{_MUST}, that accepts connections within {CONNECT_TIMEOUT_S:g} s ({reason})"
        raise ConfigError("--address", given, must, _REMEDY)


def _require_version(given: str, address: str) -> None:
    """Raises: ConfigError when no job server answers, or one of another version of Ray."""
    import requests
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    headers = get_auth_headers_if_auth_enabled({})
    try:
        answer = requests.get(f"{address}/api/version", timeout=_ANSWER_TIMEOUT_S, headers=headers)
        if answer.status_code in (401, 403):
            raise ConfigError("--address", given, NEEDS_TOKEN, TOKEN_REMEDY)
        theirs = str(answer.json()["ray_version"])
    except (OSError, requests.JSONDecodeError, KeyError, TypeError):
        must = f"{_MUST} (something listens there, but it is not a Ray job server)"
        raise ConfigError("--address", given, must, _REMEDY) from None
    mine = versions()["Ray"]
    if theirs != mine:
        must = f"run Ray {mine} as this machine does (the cluster runs Ray {theirs})"
        raise ConfigError("--address", given, must, "use one version on both sides")
