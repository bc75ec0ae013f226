"""Builds the Grafana dashboards in ``deploy/grafana``, and docs/monitoring.md, from their definition.

    python -m deploy.dashboards.build

It needs the development packages; a run and `distill dashboards` need only the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.dashboards.config import RAY_TARGETS, prometheus_config
from deploy.dashboards.panels import DASHBOARDS, DashboardSpec, Panel

FOLDER = Path(__file__).parent.parent / "grafana"
PROMETHEUS = FOLDER / "prometheus.yml"
PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
_PANELS_PER_ROW = 3
_INTRODUCTION = """# Monitoring

`distill watch RUN` follows a run that trains, from its folder alone: the live line, alarms and evaluations in the
terminal, or with `--web` the whole report in a browser, on loopback.

A run exports its numbers through Ray's metrics while it trains: every column of `metrics.parquet`, the seconds and
tokens of each actor, memory and free space, and vLLM's own metrics of each engine, labelled with the run's id and the
role, and where it is one actor's number, with the actor as `member`. On one machine, one command collects them, and
shows them where Grafana is installed:

```sh parse
.venv/bin/distill dashboards runs/demo              # Prometheus on http://127.0.0.1:9090
```

On a cluster, `deploy/grafana/prometheus.yml` is the configuration of a Prometheus on the head node: it finds Ray's nodes
in the list that Ray keeps there. vLLM names a run's engine in its label `model_name`; the configuration turns that into
the labels of the run, so copy its `metric_relabel_configs` into a Prometheus that collects Ray's metrics already.

Prometheus is a package of Debian (`apt-get install prometheus`). The dashboards are `deploy/grafana/*.json`, for import
into Grafana; its own builders wrote them, and no test has imported them. They and this page are built from one definition, `deploy/dashboards/panels.py`, by
`python -m deploy.dashboards.build`. A test asks a real Prometheus each query of each panel during a real run.

A Prometheus that is down, or an exporter that fails, never slows or ends a run. Numbers are exported every five seconds,
and Ray passes them on every ten; where updates are shorter, the dashboards have some of them. `metrics.parquet` has all,
and outlives the cluster.

"""
_WIDTH, _HEIGHT = 24 // _PANELS_PER_ROW, 8


def dashboard_json(spec: DashboardSpec) -> str:
    """A dashboard as JSON that Grafana imports."""
    from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable, Row
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    board = (
        Dashboard(spec.title)
        .uid(spec.uid)
        .tags(["distill"])
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(DatasourceVariable("datasource").label("data source").type("prometheus"))
        .with_variable(
            QueryVariable("run_id")
            .label("run")
            .datasource(source)
            .query("label_values(ray_distill_update, run_id)")
        )
    )
    for title, panels in spec.rows.items():
        board = board.with_row(Row(title))
        for panel in panels:
            board = board.with_panel(_panel(panel, source))
    return json.dumps(json.loads(JSONEncoder().encode(board.build())), indent=1, sort_keys=True) + "\n"


def _panel(panel: Panel, source: Any) -> Any:
    from grafana_foundation_sdk.builders.prometheus import Dataquery
    from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries

    shown = TimeSeries().title(panel.title).description(panel.description).unit(panel.unit).datasource(source)
    for number, query in enumerate(panel.queries):
        target = Dataquery().expr(query.expression).legend_format(query.legend).ref_id(chr(ord("A") + number))
        shown = shown.with_target(target)
    return shown.span(_WIDTH).height(_HEIGHT)


def page() -> str:
    """docs/monitoring.md: how to look at a run, and what each panel says."""
    lines = [_INTRODUCTION]
    for spec in DASHBOARDS:
        lines.append(f"## {spec.title.removeprefix('distill: ').capitalize()}\n")
        lines.append("| panel | what it shows, and what to do |\n|---|---|")
        lines += [f"| {panel.title} | {panel.description} |" for panel in spec.panels]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def cluster_config() -> str:
    """The configuration of a Prometheus on the head node of a cluster, in JSON, which is YAML."""
    return prometheus_config([RAY_TARGETS]) + "\n"


def main() -> None:
    PAGE.write_text(page())
    PROMETHEUS.write_text(cluster_config())
    for spec in DASHBOARDS:
        (FOLDER / f"{spec.uid}.json").write_text(dashboard_json(spec))


if __name__ == "__main__":
    main()
