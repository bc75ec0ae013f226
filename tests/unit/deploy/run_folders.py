"""Run folders for the tests of reports, without a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill.evaluation import EXTRA_METRICS, METRICS, Evaluation, save_evaluation
from distill.files import write_json
from distill.run.folder import RunFolder
from distill.run.metrics import MetricsWriter

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e\"'&amp;</div></main>"
"""Text as a model can write it."""


def evaluation(label: str, value: float, num_prompts: int = 4) -> Evaluation:
    columns: dict[str, np.ndarray] = {"prompt_index": np.arange(num_prompts)}
    spread = 1 + 0.05 * np.cos(np.arange(num_prompts))
    for metric in (*METRICS, *EXTRA_METRICS):
        columns[f"{metric}.sum"] = value * spread
        columns[f"{metric}.weight"] = np.ones(num_prompts)
    return Evaluation(label, pa.table(columns))


def row(update: int) -> dict[str, float]:
    """The metrics of one update."""
    falling, wave = 1 / (1 + update / 20), 0.02 * np.sin(update)
    return {
        "critic/teacher_text.d_mm": 0.5 * falling + wave,
        "critic/student_text.d_mm": 0.4 * falling - wave,
        "critic/teacher_text.tightness": 0.9 + wave,
        "critic/student_text.tightness": 0.8 - wave,
        "critic/teacher_text.loss": -0.2 * falling,
        "critic/grad_norm": 0.3 + wave,
        "policy/loss": 0.7 * falling + wave,
        "policy/grad_norm": 1.2 * falling,
        "policy/teacher_text.tv": 0.4 * falling + wave,
        "policy/student_text.tv": 0.3 * falling - wave,
        "policy/student_text.entropy": 2 * falling,
        "policy/long_over_direct": 3 + 10 * wave,
        "policy/response_length": 40 + 100 * wave,
        "rollout/busy_share": 0.5 + 0.3 * np.sin(update / 9),
        "teacher/busy_share": 0.3,
        "learner/busy_share": 0.55 + 0.2 * np.cos(update / 9),
        "timing/update_s": 2.0 + wave,
        "timing/push_s": 0.2,
    }


def write_events(folder: RunFolder, events: list[dict[str, Any]]) -> None:
    """``at``: minutes after noon."""
    lines: list[str] = []
    for event in events:
        minutes = event.pop("at")
        time = f"2026-11-27T12:{int(minutes):02d}:{int(60 * minutes) % 60:02d}.000Z"
        lines.append(json.dumps({"time": time, **event}) + "\n")
    folder.events.write_text("".join(lines))


EVENTS: list[dict[str, Any]] = [
    {"at": 0, "event": "started", "incarnation": 1, "versions": {"torch": "2.13.0", "Python": "3.11.2"}},
    {"at": 0, "event": "stage_started", "stage": "warm_start"},
    {"at": 0.5, "event": "sft_update", "update": 1, "sft/loss": 3.0},
    {"at": 1, "event": "sft_update", "update": 2, "sft/loss": 2.0},
    {"at": 1.5, "event": "stage_finished", "stage": "warm_start", "seconds": 90.0},
    {
        "at": 1.5, "event": "training_started", "updates_done": 0,
        "setup": {"max_policy_age": 2, "num_cores": None, "num_threads": {}},
    },
    {"at": 2, "event": "evaluated", "label": "before"},
    {"at": 6, "event": "alarm", "update": 30, "message": "critic/teacher_text.tightness is 0.40"},
    {"at": 8, "event": "finished", "updates": 60},
]  # fmt: skip


def run_folder(path: Path, num_updates: int = 60, text: str = "Paris.") -> RunFolder:
    """A finished run. ``text``: what models and prompts say in it."""
    folder = RunFolder(path)
    folder.evaluations.mkdir(parents=True)
    folder.student.mkdir()
    identity = {
        "run_id": "0a1b2c3d",
        "incarnation": 1,
        "fingerprint": "f" * 16,
        "created_at": "2026-11-27T12:00:00",
    }
    write_json(folder.path / "run.json", {**identity, "started_at": identity["created_at"]})
    write_json(folder.settings, {"learner.num_updates": num_updates, "replay.max_policy_age": 2})
    folder.config.write_text("recipe:\n  name: ammd\n")
    writer = MetricsWriter(folder.path, interval_s=1e9)
    for update in range(1, num_updates + 1):
        writer.write(update, row(update))
    writer.close()
    before, after = evaluation("before", 0.5), evaluation("after", 0.25)
    during = [evaluation(f"step-{num_updates // 3 * part}", 0.5 - 0.08 * part) for part in (1, 2)]
    for found in (before, *during, after):
        save_evaluation(folder.evaluations, found)
    for label in ("before", "after"):
        rows = [{"prompt": f"Which city? {text}", "teacher": text, "student": f"{label}: {text}"}] * 2
        (folder.evaluations / f"{label}-answers.json").write_text(json.dumps(rows))
    write_events(folder, [dict(event) for event in EVENTS])
    folder.best.mkdir(exist_ok=True)
    write_json(folder.best_numbers, {"metric": "teacher_text.tv", "update": 40, "value": 0.34})
    write_json(folder.summary, summary_of(num_updates, before, after))
    return folder


def summary_of(num_updates: int, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    return {
        "updates": num_updates,
        "recipe": "ammd",
        "before": before.to_dict(),
        "after": after.to_dict(),
        "best": None,
        "timing_s": {
            "training": 300.0, "evaluation": 40.0, "push_waited_for_evaluations": 3.0,
            "update_waited_for_milestones": 3.0, "rollout_busy": 200.0,
        },
        "tokens": {"rollout": 123456, "learner": 234567},
        "limit": {"stage": "learner", "busy_share": 0.9},
        "peak_pss_bytes": {"total": 3 * 2**30, "learner": 2**30},
        "wall_s": 480.0,
        "incarnations": 1,
    }  # fmt: skip
