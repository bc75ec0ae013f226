"""The dashboards over a real run: every query of every panel finds numbers in a real Prometheus."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.dashboards.panels import DASHBOARDS, RUN
from deploy.dashboards.serve import prometheus
from tests.integration.test_pools import until
from tests.integration.test_train import assert_nothing_shared, start, train_arguments, world

__all__ = ["world"]  # the fixture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="Prometheus is not installed: apt-get install prometheus",
    ),
]

SCRAPE_EVERY_S = 1


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    yield number


def found(port: int, expression: str) -> list[object]:
    """The series of an expression now."""
    query = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=10) as answer:
        return json.load(answer)["data"]["result"]


def without_numbers(port: int, run_id: str) -> list[str]:
    """The queries of all panels that find nothing."""
    missing: list[str] = []
    for board in DASHBOARDS:
        for panel in board.panels:
            for query in panel.queries:
                expression = query.expression.replace(RUN, run_id).replace("$__rate_interval", "30s")
                if not found(port, expression):
                    missing.append(f"{board.title}: {panel.title}: {expression}")
    return missing


def test_every_query_of_every_panel_finds_numbers_of_a_run(world: Path, tmp_path: Path, port: int) -> None:
    settings = ["replay.max_policy_age=1", "learner.num_updates=100000", "evaluation.every=0",
                "checkpoint.every=1000"]  # fmt: skip
    process = start(world, *train_arguments(world, "watched", *settings))
    run = world / "watched"
    target = run / "prometheus-target.json"
    try:
        until(lambda: target.exists() or process.poll() is not None, timeout_s=300)
        run_id = json.loads((run / "run.json").read_text())["run_id"]
        with prometheus([str(target)], tmp_path, port=port, scrape_every_s=SCRAPE_EVERY_S):
            deadline = time.monotonic() + 240
            while (missing := without_numbers(port, run_id)) and time.monotonic() < deadline:
                assert process.poll() is None, process.communicate()[0][-4000:]
                time.sleep(2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert missing == [], output[-2000:]
    assert_nothing_shared(run)
