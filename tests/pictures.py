"""Draws the picture of the README: the report of an example run, as a browser shows it.

    python -m tests.pictures

It needs chromium. The numbers are made up; their sizes are those of docs/demo.md.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from deploy.report.run_files import read_run
from deploy.report.run_page import write_page
from distill.evaluation import EXTRA_METRICS, METRICS, Evaluation, save_evaluation
from distill.files import write_json
from distill.run.folder import RunFolder
from tests.unit.deploy.browser import Browser
from tests.unit.deploy.run_folders import run_folder, summary_of

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "report.png"
WIDTH, HEIGHT = 1100, 1560
LARGEST_BYTES = 200_000
NUM_PROMPTS, NUM_UPDATES = 96, 60
BEFORE_AND_AFTER = {
    "teacher_text.tv": (0.525, 0.480),
    "teacher_text.forward_kl": (1.38, 1.12),
    "teacher_text.reverse_kl": (1.68, 1.36),
    "teacher_text.jsd": (0.23, 0.20),
    "student_text.tv": (0.479, 0.440),
    "student_text.forward_kl": (1.19, 0.95),
    "student_text.reverse_kl": (1.19, 0.97),
    "student_text.jsd": (0.20, 0.17),
    "rouge_l.teacher": (0.118, 0.114),
    "rouge_l.reference": (0.109, 0.119),
    "entropy": (2.1, 1.9),
    "length": (52.0, 49.0),
}
ANSWERS = [
    {
        "prompt": "What is the capital of France?",
        "teacher": "The capital of France is Paris.",
        "before": "The capital of France is Paris, City of Paris, City of Paris, City of Paris, …",
        "after": "The capital of France is Paris, France, and the City of Paris.",
    }
]
"""From docs/demo.md."""


def evaluation(label: str, share: float) -> Evaluation:
    """An evaluation of ``share`` of the way from before to after; prompts differ as much as real ones."""
    prompts = np.random.default_rng(0).lognormal(0.0, 0.2, NUM_PROMPTS)
    change = np.random.default_rng(1).normal(0.0, 0.05, NUM_PROMPTS)
    columns: dict[str, np.ndarray] = {"prompt_index": np.arange(NUM_PROMPTS)}
    for metric in (*METRICS, *EXTRA_METRICS):
        before, after = BEFORE_AND_AFTER.get(metric, (0.5, 0.45))
        value = before + share * (after - before)
        columns[f"{metric}.sum"] = value * (prompts / prompts.mean() + share * change)
        columns[f"{metric}.weight"] = np.ones(NUM_PROMPTS)
    return Evaluation(label, pa.table(columns))


def example_run(path: Path) -> RunFolder:
    """The folder of a run like the demo's."""
    folder = run_folder(path, NUM_UPDATES)
    evaluations = {"before": 0.0, "step-20": 0.6, "step-40": 0.9, "after": 1.0}
    for label, share in evaluations.items():
        save_evaluation(folder.evaluations, evaluation(label, share))
    for label in ("before", "after"):
        rows = [
            {**{name: row[name] for name in ("prompt", "teacher")}, "student": row[label]} for row in ANSWERS
        ]
        (folder.evaluations / f"{label}-answers.json").write_text(json.dumps(rows))
    folder.student.rmdir()  # lines with paths of this machine would be shown
    (folder.path / "best.json").unlink()
    write_json(folder.summary, summary_of(NUM_UPDATES, evaluation("before", 0.0), evaluation("after", 1.0)))
    return folder


def draw(picture: Path) -> None:
    """Write the picture, with as few colours as look the same, because a page has few."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        page = write_page(read_run(example_run(folder / "demo").path))
        with Browser(folder) as browser:
            browser.open(page, width=WIDTH, height=HEIGHT)
            browser.screenshot(folder / "shot.png")
        picture.parent.mkdir(exist_ok=True)
        with Image.open(folder / "shot.png") as shot:
            shot.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    draw(PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size >> 10} KiB")
