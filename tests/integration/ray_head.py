"""A Ray head of a test's own: on its own loopback address and ports, in its own folder, with its own processes."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

from deploy.submit.archive import PACKAGES

ROOT = Path(__file__).parents[2]
_HIDE_THIS_PACKAGE = f"""
import os, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path[:] = [
    path for path in sys.path if "working_dir_files" in path or not os.path.isdir(os.path.join(path, "{PACKAGES[0]}"))
]
"""
"""A sitecustomize.py: Python finds this project no more, although the environment has it in editable form."""


class RayHead:
    """A head that announces GPUs which do not exist; it is ended by its processes.

    ``token``: whether it needs a token, which it has in a home folder of its own.
    """

    def __init__(self, cache: Path, *, token: bool, num_cpus: int = 2, num_gpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need short paths
        self.host = _loopback()
        ports = _free_ports(self.host, 5)
        self.address = f"{self.host}:{ports[0]}"
        self.dashboard = f"http://{self.host}:{ports[1]}"
        hiding = self.folder / "hiding"
        hiding.mkdir()
        (hiding / "sitecustomize.py").write_text(_HIDE_THIS_PACKAGE)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))
        } | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(hiding),
            "DISTILL_CACHE": str(cache),
            "RAY_USAGE_STATS_ENABLED": "0",
            "HOME": str(self.folder),
        }
        self.token = ""
        if token:
            self.token = self._ray("get-auth-token", "--generate").strip()
        else:
            self.environment["RAY_AUTH_MODE"] = "disabled"
        try:
            self._ray(
                "start", "--head", f"--port={ports[0]}", f"--dashboard-host={self.host}",
                f"--node-ip-address={self.host}", f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}",
                f"--dashboard-agent-listen-port={ports[3]}", f"--dashboard-agent-grpc-port={ports[4]}",
                f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}", *self._common,
            )  # fmt: skip
            self._wait_for_jobs()
        except BaseException:
            self.stop()
            raise

    @property
    def access(self) -> dict[str, str]:
        """The environment variables of a user of this head."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token} if self.token else {}

    def join(self, num_cpus: int) -> None:
        """Start a second node on this machine, without GPUs."""
        self._ray("start", f"--address={self.address}", f"--node-ip-address={_loopback()}", f"--num-cpus={num_cpus}",
                  "--num-gpus=0", *self._common)  # fmt: skip

    def stop(self) -> None:
        """End every process of this head, which are the ones that have its folder in their command or environment."""
        for sign in ("terminate", "kill"):
            own = self._processes()
            for process in own:
                try:
                    getattr(process, sign)()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(own, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _common(self) -> list[str]:
        return [f"--temp-dir={self.folder}/t", f"--object-store-memory={100 << 20}"]

    def _ray(self, *arguments: str) -> str:
        """Run a command of Ray; returns its stdout."""
        done = subprocess.run(
            ["ray", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _processes(self) -> list[psutil.Process]:
        own = []
        for process in psutil.process_iter():
            try:
                words = [*process.cmdline(), *process.environ().values()]
            except psutil.Error:
                continue
            if process.pid != os.getpid() and any(str(self.folder) in word for word in words):
                own.append(process)
        return own

    def _wait_for_jobs(self) -> None:
        """Wait until the job server answers, which is some seconds after the head has started."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        deadline = time.monotonic() + 60
        while True:
            try:
                urlopen(Request(f"{self.dashboard}/api/version", headers=headers), timeout=5).close()
                return
            except OSError as error:
                assert time.monotonic() < deadline, f"the dashboard does not answer: {error}"
                time.sleep(0.5)


def _loopback() -> str:
    return "127." + ".".join(str(1 + byte % 254) for byte in secrets.token_bytes(3))


def _free_ports(host: str, count: int) -> list[int]:
    sockets = [socket.create_server((host, 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports
