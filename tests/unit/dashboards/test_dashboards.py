"""The dashboards' definition and the files that are built from it."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
from pathlib import Path

import pytest

from actors.build import engine_name
from deploy.dashboards import serve
from deploy.dashboards.build import FOLDER, PAGE, PROMETHEUS, cluster_config, dashboard_json, page
from deploy.dashboards.config import ENGINE_NAME, prometheus_config
from deploy.dashboards.panels import DASHBOARDS, DashboardSpec, Panel
from deploy.run.telemetry import names
from distill.config import RunConfig
from distill.errors import ConfigError
from distill.interfaces import Holder

PANELS = [(board, panel) for board in DASHBOARDS for panel in board.panels]


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_the_files_are_built_from_the_definition(board: DashboardSpec) -> None:
    """Otherwise: python -m deploy.dashboards.build"""
    assert (FOLDER / f"{board.uid}.json").read_text() == dashboard_json(board)


@pytest.mark.parametrize(("board", "panel"), PANELS, ids=lambda each: getattr(each, "title", ""))
def test_every_panel_has_a_unit_and_says_what_to_do(board: DashboardSpec, panel: Panel) -> None:
    assert panel.unit and panel.queries
    assert len(panel.description.split()) >= 5 and panel.description.endswith(".")
    for query in panel.queries:
        assert 'run_id="$run_id"' in query.expression
        assert query.legend


def test_descriptions_name_settings_that_exist() -> None:
    config = dataclasses.asdict(RunConfig())
    sections = "|".join(name for name, value in config.items() if isinstance(value, dict))
    for _, panel in PANELS:
        for section, name in re.findall(rf"\b({sections})\.([a-z_]+)", panel.description):
            assert name in config[section], (panel.title, section, name)


def test_the_page_is_built_from_the_definition() -> None:
    """Otherwise: python -m deploy.dashboards.build"""
    assert PAGE.read_text() == page()
    assert PROMETHEUS.read_text() == cluster_config()


def test_no_panel_covers_another() -> None:
    for board in DASHBOARDS:
        panels = json.loads((FOLDER / f"{board.uid}.json").read_text())["panels"]
        taken: set[tuple[int, int]] = set()
        for panel in panels:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert not cells & taken, (board.title, panel["title"])
            taken |= cells


def test_names_follow_prometheus() -> None:
    for metric in names.EXPORTED:
        assert re.fullmatch(r"distill_[a-z_]+", metric.name) and metric.description.endswith(".")
    assert names.of_column("policy/teacher_text.forward_kl") == "distill_policy_teacher_text_forward_kl"
    assert names.ACTOR_TOKENS.in_prometheus == "ray_distill_actor_tokens_total"


def test_prometheus_looks_into_the_files_of_the_runs() -> None:
    config = json.loads(prometheus_config(["/runs/a b/prometheus-target.json"], 1))
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/runs/a b/prometheus-target.json"]
    assert config["global"]["scrape_interval"] == "1s"


def test_the_name_of_an_engine_becomes_the_labels_of_its_run() -> None:
    name = engine_name(RunConfig(), "0a1b2c3d", Holder("teacher", 1, 1000))
    assert name is not None
    found = re.fullmatch(ENGINE_NAME, name)
    assert found is not None and found.groups() == ("0a1b2c3d", str(Holder("teacher", 1, 1000)), "teacher")


def test_a_missing_prometheus_has_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serve.shutil, "which", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"prometheus must be installed .*apt-get install prometheus"),
        serve.prometheus([], tmp_path, port=9090),
    ):
        pass


def test_a_port_that_another_program_has_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another Prometheus there would answer instead of ours."""
    monkeypatch.setattr(serve.shutil, "which", lambda name: "/bin/true")
    with socket.socket() as other:
        other.bind((serve.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"--port={port} must be a free port"),
            serve.prometheus([], tmp_path, port=port),
        ):
            pass


def test_a_prometheus_that_ends_is_not_taken_for_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve.shutil, "which", lambda name: "/bin/false")
    with socket.socket() as free:
        free.bind((serve.HOST, 0))
        port = free.getsockname()[1]
    with (
        pytest.raises(ConfigError, match="prometheus must run; it has ended"),
        serve.prometheus([], tmp_path, port=port),
    ):
        pass
