"""`distill dashboards`: Prometheus over the runs of this machine, and Grafana with the dashboards, on loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deploy.dashboards.build import FOLDER
from deploy.dashboards.config import RAY_TARGETS, SCRAPE_EVERY_S, prometheus_config
from distill.errors import NO_VALUE, ConfigError, first_line
from distill.run.folder import RunFolder

HOST = "127.0.0.1"
PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
READY_WITHIN_S, END_WITHIN_S = 30.0, 10.0
GRAFANA_HOME = "/usr/share/grafana"
"""Where the packages of Debian and Fedora put it."""
_GRAFANA = ("grafana", "grafana-server")


@contextmanager
def prometheus(
    targets: Sequence[str], data: Path, *, port: int, scrape_every_s: int = SCRAPE_EVERY_S
) -> Iterator[subprocess.Popen[bytes]]:
    """Run Prometheus on loopback while the context is open. ``data``: its database.

    Raises: ConfigError when it is not installed, or the port is taken.
    """
    program = shutil.which("prometheus")
    if program is None:
        must = "be installed and on PATH, because it collects what runs export"
        raise ConfigError(
            "prometheus", NO_VALUE, must, "install it, with `apt-get install prometheus` on Debian"
        )
    _require_free("--port", port, "choose another")
    data.mkdir(parents=True, exist_ok=True)
    config = data / "prometheus.yml"
    config.write_text(prometheus_config(targets, scrape_every_s))
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={data / 'tsdb'}",
        f"--web.listen-address={HOST}:{port}",
        "--log.level=error",
    ]
    with _program("prometheus", command, f"http://{HOST}:{port}/-/ready") as process:
        yield process


@contextmanager
def _program(
    name: str, command: Sequence[str], ready: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the context is open. ``ready``: the URL at which it answers when it has started.

    Raises: ConfigError when it does not start.
    """
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, name, ready)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _require_free(name: str, port: int, remedy: str) -> None:
    """Raises: ConfigError when another program, such as another Prometheus, has the port."""
    try:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(name, port, f"be a free port ({first_line(error)})", remedy) from None


def _wait_until_ready(process: subprocess.Popen[bytes], name: str, url: str) -> None:
    """Wait until a program that was started answers. Raises: ConfigError when it does not."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ConfigError(name, NO_VALUE, "run; it has ended", "read its output above")
        try:
            with direct.open(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise ConfigError(name, NO_VALUE, f"answer within {READY_WITHIN_S:g} s", "read its output above")


def serve(run_dirs: Sequence[str], port: int) -> None:
    """Collect the numbers of runs until interrupted, and show them where Grafana is installed."""
    targets = [RAY_TARGETS]
    for run_dir in run_dirs:
        folder = RunFolder(run_dir)
        folder.require()
        targets.append(str(folder.metrics_target))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="distill-dashboards-")))
        running = stack.enter_context(prometheus(targets, scratch / "prometheus", port=port))
        print(f"Prometheus: http://{HOST}:{port}")
        address = stack.enter_context(_grafana(scratch / "grafana", port))
        if address is None:
            print(f"Grafana is not installed; import the dashboards in {FOLDER} into yours")
        else:
            print(f"Grafana: {address}")
        print("press Ctrl-C to end", flush=True)
        code = running.wait()
    raise ConfigError(
        "prometheus", NO_VALUE, f"run; it has ended with exit code {code}", "read its output above"
    )


@contextmanager
def _grafana(folder: Path, prometheus_port: int) -> Iterator[str | None]:
    """Run Grafana on loopback with the dashboards, where it is installed; yields its address."""
    program = next((found for name in _GRAFANA if (found := shutil.which(name))), None)
    if program is None:
        yield None
        return
    command = [program, "server"] if program.endswith("grafana") else [program]
    _require_free("port of Grafana", GRAFANA_PORT, "end the program that has it")
    environment = _grafana_environment(folder, prometheus_port)
    address = f"http://{HOST}:{GRAFANA_PORT}"
    with _program("grafana", [*command, "--homepath", GRAFANA_HOME], f"{address}/api/health", environment):
        yield f"{address}/dashboards"


def _grafana_environment(folder: Path, prometheus_port: int) -> Mapping[str, str]:
    """Write Grafana's provisioning; returns the environment that makes it use it."""
    sources, boards = folder / "provisioning" / "datasources", folder / "provisioning" / "dashboards"
    for each in (sources, boards):
        each.mkdir(parents=True)
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "url": f"http://{HOST}:{prometheus_port}",
        "isDefault": True,
    }
    provider = {"name": "distill", "type": "file", "options": {"path": str(FOLDER)}}
    # JSON is YAML, which is what Grafana reads.
    (sources / "prometheus.yaml").write_text(json.dumps({"apiVersion": 1, "datasources": [source]}))
    (boards / "distill.yaml").write_text(json.dumps({"apiVersion": 1, "providers": [provider]}))
    return os.environ | {
        "GF_PATHS_DATA": str(folder / "data"),
        "GF_PATHS_LOGS": str(folder / "log"),
        "GF_PATHS_PLUGINS": str(folder / "plugins"),
        "GF_PATHS_PROVISIONING": str(folder / "provisioning"),
        "GF_SERVER_HTTP_ADDR": HOST,
        "GF_SERVER_HTTP_PORT": str(GRAFANA_PORT),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION": "true",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_LOG_MODE": "console",
        "GF_LOG_LEVEL": "error",
    }
