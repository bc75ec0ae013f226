"""The report of a run, from its folder and its summary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from deploy.report.model import Code, Paragraph, Sample, Table, Toned, piece_text
from deploy.report.run_report import LABELS, before_after_table, run_report, what_happened
from distill.errors import ConfigError
from distill.evaluation import EXTRA_METRICS, METRICS, Estimate, Evaluation, save_evaluation
from distill.run.folder import RunFolder


def summary(tv: float, length: float, rouge: float | None = 0.2) -> dict:
    divergences = {"tv": tv, "forward_kl": 0.5, "reverse_kl": 0.6, "jsd": 0.1}
    return {
        "teacher_text": divergences,
        "student_text": divergences,
        "rouge_l": {"teacher": rouge, "reference": 0.3},
        "entropy": 1.25,
        "length": length,
        "num_prompts": 128,
        "stderr": dict.fromkeys(METRICS, 0.01),
    }


def rows_of(table: Table) -> dict[str, list[str]]:
    """Metric -> the texts of the other cells."""
    names = {label: metric for metric, label in LABELS.items()}
    cells = [["".join(map(piece_text, cell)) for cell in row] for row in table.rows]
    return {names[row[0]]: row[1:] for row in cells}


def test_values_differences_and_verdicts():
    paired = {
        "teacher_text.tv": Estimate(-0.07, 0.0012),
        "student_text.tv": [0.05, 0.001],  # the form that summary.json has
        "rouge_l.reference": Estimate(0.1, 0.01),
        "teacher_text.forward_kl": Estimate(-0.01, 0.008),
        "length": Estimate(4.0, 0.5),
        "entropy": Estimate(0.1, float("nan")),
    }
    table = before_after_table(
        json.loads(json.dumps(summary(0.365, 40.0, None))), summary(0.295, 44.0), paired
    )
    assert table.title == "Before and after, 128 held-out prompts"
    rows = rows_of(table)
    assert set(rows) == set(METRICS)
    assert rows["teacher_text.tv"] == ["0.3650 ± 0.0100", "0.2950 ± 0.0100", "-0.0700 ± 0.0012", "↓ better"]
    assert rows["student_text.tv"][2:] == ["+0.0500 ± 0.0010", "↑ worse"]
    assert rows["rouge_l.reference"][-1] == "↑ better"
    assert rows["teacher_text.forward_kl"][-1] == "= within the noise"
    assert rows["length"][1:] == ["44.00 ± 0.01", "+4.00 ± 0.50", "↑ changed"]
    assert rows["rouge_l.teacher"] == ["not measured", "0.2000 ± 0.0100", "not measured", ""]
    assert rows["entropy"][2:] == ["+0.1000", ""]


def test_the_sentence_does_not_claim_what_is_noise_or_worse():
    paired = {"teacher_text.tv": Estimate(-0.01, 0.01), "student_text.tv": Estimate(0.06, 0.01)}
    sentence = what_happened(summary(0.3, 40.0), summary(0.2, 40.0), paired)
    assert "is now as far from its teacher as before on the teacher's text and" in sentence
    assert "and 20 % farther from its teacher on its own text" in sentence
    assert sentence.endswith("(ROUGE-L) is not measured.")


def test_verdicts_have_tones():
    paired = {"teacher_text.tv": Estimate(-0.1, 0.01), "student_text.tv": Estimate(0.1, 0.01)}
    table = before_after_table(summary(0.3, 40.0), summary(0.2, 40.0), paired)
    toned = [piece for row in table.rows for piece in row[-1] if isinstance(piece, Toned)]
    assert {(piece.text, piece.tone.value) for piece in toned} == {
        ("↓ better", "good"),
        ("↑ worse", "bad"),
    }


def evaluation(label: str, value: float) -> Evaluation:
    columns: dict[str, np.ndarray] = {"prompt_index": np.arange(4)}
    for metric in (*METRICS, *EXTRA_METRICS):
        columns[f"{metric}.sum"] = np.full(4, value)
        columns[f"{metric}.weight"] = np.ones(4)
    return Evaluation(label, pa.table(columns))


def finished_run(path: Path) -> tuple[Path, dict]:
    folder = RunFolder(path)
    folder.evaluations.mkdir(parents=True)
    before, after = evaluation("before", 0.5), evaluation("after", 0.25)
    for found in (before, after):
        save_evaluation(folder.evaluations, found)
    contents = {
        "before": before.to_dict(),
        "after": after.to_dict(),
        "updates": 7,
        "recipe": "ammd",
        "wall_s": 90.0,
        "peak_pss_bytes": {"total": 3 * 2**30},
        "best": None,
    }
    return path, contents


def test_the_report_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    path, contents = finished_run(tmp_path / "run")
    report = run_report(path, contents)
    assert report.title == "Run run"
    sentence, table, *closing = report.blocks
    assert sentence == Paragraph(
        (
            "On 4 held-out prompts, the student is now 50 % nearer to its teacher on the teacher's text and 50 % "
            "nearer to its teacher on its own text (total variation); the likeness of its answers to the "
            "teacher's (ROUGE-L) is 50 % lower.",
        )
    )
    assert isinstance(table, Table)
    assert rows_of(table)["teacher_text.tv"] == [
        "0.5000 ± 0.0000", "0.2500 ± 0.0000", "-0.2500 ± 0.0000", "↓ better",
    ]  # fmt: skip
    lines = [
        "".join(map(piece_text, paragraph.line)) for paragraph in closing if isinstance(paragraph, Paragraph)
    ]
    assert lines == [
        "7 updates of recipe ammd in 1.5 minutes, peak memory 3.0 GiB (PSS of all processes)",
        "talk to the student: distill chat run/student",
    ]
    monkeypatch.setattr("sys.executable", str(tmp_path / "an env/bin/python"))
    script = tmp_path / "an env/bin/distill"
    script.parent.mkdir(parents=True)
    script.touch()
    (*_, last) = run_report(path, contents).blocks
    assert isinstance(last, Paragraph)
    assert last.line == ("talk to the student: ", Code("'an env/bin/distill' chat run/student"))
    contents["best"] = {"metric": "teacher_text.tv", "update": 5, "value": 0.2}
    best = run_report(path, contents).blocks[-2]
    assert isinstance(best, Paragraph)
    assert best.line == (
        "best during training by teacher_text.tv: update 5 (0.2000), in ",
        Code("run/best"),
    )


def test_answers_are_samples_without_control_sequences(tmp_path: Path):
    path, contents = finished_run(tmp_path / "run")
    for label in ("before", "after"):
        rows = [{"prompt": "Why\x07?", "teacher": "\x1b[2JBecause", "student": f"{label}\x1b[0m"}]
        (RunFolder(path).evaluations / f"{label}-answers.json").write_text(json.dumps(rows))
    (sample,) = (block for block in run_report(path, contents).blocks if isinstance(block, Sample))
    assert sample == Sample(
        title="prompt 1, answered greedily",
        prompt="Why?",
        answers=(("teacher", "Because"), ("student before", "before"), ("student after", "after")),
    )
    (RunFolder(path).evaluations / "after-answers.json").write_text("[]")
    with pytest.raises(ValueError, match="zip"):
        run_report(path, contents)


def test_an_evaluation_that_cannot_be_read(tmp_path: Path):
    path, contents = finished_run(tmp_path / "run")
    RunFolder(path).evaluation("after").write_bytes(b"half")
    with pytest.raises(
        ConfigError, match=r"^evaluation=\S+after\.parquet must be readable \(.+\); .* repeat the run"
    ):
        run_report(path, contents)
