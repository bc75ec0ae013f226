"""`distill watch`: a run that trains, followed from its folder, in the terminal or in a browser.

It reads what the run writes and touches neither the run nor its cluster, so it works on every machine that sees the
folder, and the run does not notice it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deploy.report.html import html
from deploy.report.run_files import RunFiles, read_run
from deploy.report.run_page import run_page
from deploy.run.progress import Progress, training_line
from deploy.run.rates import Rates
from deploy.run.training.advice import advise, mean_row
from deploy.safe_text import strip_control
from distill.errors import ConfigError, first_line
from distill.run.folder import RunFolder

HOST = "127.0.0.1"
LOOK_EVERY_S = 2.0
REFRESH_EVERY_S = 10
"""How often the page in a browser loads itself again while the run trains."""


class Watch:
    """A run folder, and what has been shown of it."""

    def __init__(self, run_dir: str) -> None:
        """Raises: ConfigError when the folder is not a run's."""
        self._run_dir = run_dir
        self._num_events = 0
        self.run = read_run(run_dir)

    def look(self) -> None:
        """Read the folder again."""
        self.run = read_run(self._run_dir)

    def news(self) -> Iterator[str]:
        """The alarms and evaluations since the last call, a line each."""
        new, self._num_events = self.run.events[self._num_events :], len(self.run.events)
        for event in new:
            if event.get("event") == "alarm":
                yield strip_control(f"update {event.get('update')}: warning: {event.get('message')}")
            elif event.get("event") == "evaluated":
                yield strip_control(f"evaluation {event.get('label')}: {_distances(event)}")


def live_line(run: RunFiles) -> str:
    """The live line, as `distill train` shows it, of the last updates that the metrics have."""
    rates = Rates()
    facts: dict[str, Any] = {"num_updates": run.planned_updates or "?"}
    for row in _last_rows(run.metrics, rates.window + 1):
        facts |= {"update": int(row["update"]), "row": row, "policy_age": int(row.get("policy/age_max", 0))}
        rates.observe(facts | {"num_updates": run.planned_updates or 0})
    if advice := advise(mean_row(rates.rows), run.setup):
        facts["limit"] = advice.short
    outlook = rates.outlook() if run.planned_updates else {}
    return training_line(facts | outlook, rates.tokens_per_s())


def _last_rows(metrics: Mapping[str, Any], count: int) -> list[dict[str, float]]:
    """The last rows of the metrics, each without the columns that it lacks."""
    total = len(metrics.get("update", ()))
    rows = [
        {name: float(values[place]) for name, values in metrics.items()}
        for place in range(max(0, total - count), total)
    ]
    return [{name: value for name, value in row.items() if not math.isnan(value)} for row in rows]


def _distances(event: Mapping[str, Any]) -> str:
    parts = []
    for name, text in (("teacher_text", "the teacher's text"), ("student_text", "the student's text")):
        measured = event.get(name)
        tv = measured.get("tv") if isinstance(measured, Mapping) else None
        if isinstance(tv, int | float):
            parts.append(f"TV {tv:.4f} on {text}")
    return ", ".join(parts) or "not measured"


def how_it_stands(run: RunFiles) -> str | None:
    """Why there is nothing more to follow; None while the run trains."""
    if run.is_running:
        return None
    if run.has_ended:
        return f"the run has ended after {run.updates} updates"
    if run.failure is not None:
        error = strip_control(str(run.failure.get("message", "see failure.json")))
        return f"the run has failed: {error}; resume with: {run.folder.resume_command}"
    return f"the run stands at update {run.updates}; resume with: {run.folder.resume_command}"


def follow(run_dir: str, progress: Progress) -> None:
    """Show a run in the terminal until it ends. Raises: ConfigError when the folder is not a run's."""
    watch = Watch(run_dir)
    while True:
        for line in watch.news():
            progress.say(line)
        if (end := how_it_stands(watch.run)) is not None:
            progress.say(end)
            return
        progress.show(live_line(watch.run))
        time.sleep(LOOK_EVERY_S)
        watch.look()


def serve(run_dir: str, port: int) -> ThreadingHTTPServer:
    """A server of the run's report on loopback, which reads the folder anew for each request.

    Raises: ConfigError when the folder is not a run's, or the port is taken.
    """
    RunFolder(run_dir).require()

    class Handler(_ReportHandler):
        folder = run_dir

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError("--port", port, f"be a free port ({first_line(error)})", "choose another") from None


_DRAWING = threading.Lock()
"""matplotlib's settings are those of the whole process, and each request has a thread."""


class _ReportHandler(BaseHTTPRequestHandler):
    folder: str
    timeout = 30.0  # of a browser that connects and sends nothing

    def do_GET(self) -> None:
        # A page of another site cannot read the report under a name that it makes point here.
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            self.send_error(403)
            return
        if self.path != "/":
            self.send_error(404)
            return
        try:
            run = read_run(self.folder)
            with _DRAWING:
                content = html(run_page(run)).encode()
        except ConfigError as error:  # the folder is gone
            self.send_error(404, explain=strip_control(str(error)))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        if run.is_running:
            self.send_header("Refresh", str(REFRESH_EVERY_S))
        self.end_headers()
        with suppress(ConnectionError):  # the reader has gone
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not printed."""
