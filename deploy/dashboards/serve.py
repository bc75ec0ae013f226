"""`distill dashboards`: Prometheus over the runs of this machine, and Grafana with the dashboards, on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deploy.dashboards.build import FOLDER
from distill.errors import NO_VALUE, ConfigError
from distill.run.folder import RunFolder

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
SCRAPE_EVERY_S = 5
RAY_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"
"""Ray's own list of nodes, where a cluster with a dashboard runs on this machine."""
_GRAFANA = ("grafana", "grafana-server")


def prometheus_config(targets: Sequence[str], scrape_every_s: int = SCRAPE_EVERY_S) -> str:
    """The configuration of a Prometheus that looks for runs in these files. It is JSON, which YAML contains."""
    discovery = {"files": list(targets), "refresh_interval": "5s"}
    return json.dumps(
        {
            "global": {"scrape_interval": f"{scrape_every_s}s", "scrape_timeout": f"{scrape_every_s}s"},
            "scrape_configs": [{"job_name": "distill", "file_sd_configs": [discovery]}],
        },
        indent=1,
    )


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
    data.mkdir(parents=True, exist_ok=True)
    config = data / "prometheus.yml"
    config.write_text(prometheus_config(targets, scrape_every_s))
    process = subprocess.Popen(
        [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={data / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        _wait_until_ready(process, port)
        yield process
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(300):
        if process.poll() is not None:
            must = "be free for Prometheus, which ended; its reason is above"
            raise ConfigError("--port", port, must, "choose another port")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=1):
                return
        except OSError:
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    raise ConfigError("prometheus", NO_VALUE, "answer within 30 s", "read its output above")


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
        print(f"Prometheus: http://127.0.0.1:{port}")
        address = stack.enter_context(_grafana(scratch / "grafana", port))
        if address is None:
            print(f"Grafana is not installed; import the dashboards in {FOLDER} into yours")
        else:
            print(f"Grafana: {address}")
        print("press Ctrl-C to end", flush=True)
        running.wait()


@contextmanager
def _grafana(folder: Path, prometheus_port: int) -> Iterator[str | None]:
    """Run Grafana on loopback with the dashboards, where it is installed; yields its address."""
    program = next((found for name in _GRAFANA if (found := shutil.which(name))), None)
    if program is None:
        yield None
        return
    command = [program, "server"] if program.endswith("grafana") else [program]
    process = subprocess.Popen(
        [*command, "--homepath", "/usr/share/grafana"],
        env=_grafana_environment(folder, prometheus_port),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{GRAFANA_PORT}/dashboards"
    finally:
        process.terminate()
        process.wait()


def _grafana_environment(folder: Path, prometheus_port: int) -> Mapping[str, str]:
    """Write Grafana's provisioning; returns the environment that makes it use it."""
    sources, boards = folder / "provisioning" / "datasources", folder / "provisioning" / "dashboards"
    for each in (sources, boards):
        each.mkdir(parents=True)
    source = {
        "name": "Prometheus",
        "type": "prometheus",
        "url": f"http://127.0.0.1:{prometheus_port}",
        "isDefault": True,
    }
    provider = {"name": "distill", "type": "file", "options": {"path": str(FOLDER)}}
    # JSON is YAML, which is what Grafana reads.
    (sources / "prometheus.yaml").write_text(json.dumps({"apiVersion": 1, "datasources": [source]}))
    (boards / "distill.yaml").write_text(json.dumps({"apiVersion": 1, "providers": [provider]}))
    return os.environ | {
        "GF_PATHS_DATA": str(folder / "data"),
        "GF_PATHS_PROVISIONING": str(folder / "provisioning"),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(GRAFANA_PORT),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_LOG_LEVEL": "error",
    }
