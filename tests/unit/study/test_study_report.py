"""Reports and plots of results with known values."""

from __future__ import annotations

import math
from pathlib import Path

from deploy.report.render import markdown
from deploy.study.tables.plots import draw
from deploy.study.tables.study_report import study_report


def run(recipe: str, seed: int, seconds: list[float], values: list[float]) -> dict:
    points = [
        {"update": 10 * i, "train_s": at, "values": {"teacher_text.tv": value}}
        for i, (at, value) in enumerate(zip(seconds, values, strict=True))
    ]
    final = {"teacher_text.tv": values[-1]}
    return {
        "recipe": recipe, "seed": seed, "run": "x", "texts": None, "final": final, "critics": {},
        "evaluations": points,
    }  # fmt: skip


def text_of(results: dict) -> str:
    return markdown(study_report(results))


RESULTS = {
    "study": "s",
    "task": "t",
    "method_hash": "h",
    "metrics": ["teacher_text.tv"],
    "baseline": "kd",
    "teacher": [],
    "comparisons": [],
    "diverged": [],
    "differences": [],
    "chosen": {"kd": {}, "ammd": {}},
    "runs": [
        run("kd", 0, [0.0, 10.0, 20.0], [0.5, 0.4, 0.3]),
        run("ammd", 0, [0.0, 40.0, 80.0], [0.5, 0.3, 0.2]),
        run("kd", 1, [0.0, 12.0, 24.0], [0.5, 0.4, 0.3]),
        run("ammd", 1, [0.0, 40.0, 80.0], [0.5, 0.3, 0.2]),
    ],
}


def test_equal_time_is_that_of_the_fastest_run():
    table = text_of(RESULTS).split("At equal time")[1]
    assert "after 20 s of training" in table
    # kd: 0.3 at 20 s, and at log 20 between 0.4 at 12 s and 0.3 at 24 s; ammd is first seen at 40 s.
    share = math.log(20 / 12) / math.log(2)
    assert f"| `kd` | {10 * (2 + 1 + share) / 2:.0f} | {(0.3 + 0.4 - 0.1 * share) / 2:.4f} |" in table
    assert "| `ammd` |  |  |" in table


def test_equal_results_give_identical_plots(tmp_path: Path):
    (path,) = draw(RESULTS, tmp_path)
    first = path.read_bytes()
    assert b"ammd" in first and len(first) > 1000
    draw(RESULTS, tmp_path)
    assert path.read_bytes() == first


def test_recipes_without_thirds_have_no_drift():
    early_late = {
        f"{text}_text.tv_{part}": 0.2 for text in ("teacher", "student") for part in ("early", "late")
    }
    runs = [RESULTS["runs"][0] | {"final": early_late}, RESULTS["runs"][1] | {"final": {}}]
    table = text_of(RESULTS | {"runs": runs}).split("Early against late")[1]
    assert "| `kd` | 0.2000 | 0.2000 | 0.2000 | 0.2000 | 1.000 | 1.000 |" in table
    assert "| `ammd` | nan |" in table


def test_differences_come_from_the_results_only():
    rows = [
        {"seed": seed, "recipe": "ammd", "from": "kd", "metric": "teacher_text.tv",
         "difference": -0.1, "error": 0.001}
        for seed in (0, 1)
    ]  # fmt: skip
    runs = [each | {"final": {"teacher_text.tv": 0.3}} for each in RESULTS["runs"]]
    results = RESULTS | {"runs": runs, "comparisons": [["ammd", "kd"]], "differences": rows}
    # Two seeds that agree: the error over prompts, 0.001 / √2, times t's quantile with one degree, 12.7.
    found = "-0.1000* [-0.1090, -0.0910]"
    text = text_of(results)
    assert f"| `ammd` | 2 |  | 0.3000 ({found}) |" in text
    assert f"| `ammd` − `kd` | {found} |" in text
    nothing = text_of(results | {"differences": [row | {"difference": None, "error": None} for row in rows]})
    assert "nan" in nothing and "*" not in nothing.split("\n\n")[1], (
        "a difference that is not a number is not significant"
    )
