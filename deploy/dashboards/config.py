"""The configuration of a Prometheus that collects the numbers of runs."""

from __future__ import annotations

import json
from collections.abc import Sequence

SCRAPE_EVERY_S = 5
ENGINE_NAME = "(.+):((.+)-[0-9.]+)"
"""What an engine publishes vLLM's metrics under: the run's id, and the actor's name, which begins with its role."""
RAY_TARGETS = "/tmp/ray/prom_metrics_service_discovery.json"
"""Ray's own list of nodes, where a cluster with a dashboard runs on this machine."""


def prometheus_config(targets: Sequence[str], scrape_every_s: int = SCRAPE_EVERY_S) -> str:
    """The configuration of a Prometheus that looks for runs in these files. It is JSON, which YAML contains."""
    discovery = {"files": list(targets), "refresh_interval": "5s"}
    return json.dumps(
        {
            "global": {"scrape_interval": f"{scrape_every_s}s", "scrape_timeout": f"{scrape_every_s}s"},
            # A target that two files name with different jobs would be counted twice.
            "scrape_configs": [
                {
                    "job_name": "distill",
                    "file_sd_configs": [discovery],
                    "relabel_configs": [{"target_label": "job", "replacement": "distill"}],
                    "metric_relabel_configs": _labels_of_engines(),
                }
            ],
        },
        indent=1,
    )


def _labels_of_engines() -> list[dict[str, object]]:
    """vLLM's metrics name a run's engine in ``model_name``, as RUN:ROLE-NUMBER. It becomes the labels of other metrics."""
    return [
        {
            "source_labels": ["model_name"],
            "regex": ENGINE_NAME,
            "target_label": label,
            "replacement": f"${group}",
        }
        for label, group in (("run_id", 1), ("member", 2), ("role", 3))
    ]
