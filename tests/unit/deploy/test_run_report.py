"""The report of a run, from its folder and its summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.report.model import Block, Paragraph, Sample, Table, Toned, piece_text
from deploy.report.run_files import read_run
from deploy.report.run_report import LABELS, before_after_table, run_report, what_happened
from distill.evaluation import METRICS, Estimate
from tests.unit.deploy.run_folders import run_folder


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


def text_of(paragraph: Block) -> str:
    assert isinstance(paragraph, Paragraph)
    return "".join(map(piece_text, paragraph.line))


def test_the_report_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    folder = run_folder(tmp_path / "run", num_updates=7)
    run = read_run("run")
    assert run.problems == []
    report = run_report(run)
    assert report.title == "Run run"
    sentence, table, *rest = report.blocks
    assert text_of(sentence) == (
        "On 4 held-out prompts, the student is now 50 % nearer to its teacher on the teacher's text and 50 % "
        "nearer to its teacher on its own text (total variation); the likeness of its answers to the "
        "teacher's (ROUGE-L) is 50 % lower."
    )
    assert isinstance(table, Table)
    assert [cell.partition(" ")[0] for cell in rows_of(table)["teacher_text.tv"]] == [
        "0.5008", "0.2504", "-0.2504", "↓",
    ]  # fmt: skip
    closing = [text_of(block) for block in rest if not isinstance(block, Sample)]
    assert closing == [
        "7 updates of recipe ammd in 8.0 minutes, peak memory 3.0 GiB (PSS of all processes)",
        "best during training by teacher_text.tv: update 40 (0.3400), in run/best",
        "talk to the student: distill chat run/student",
    ]
    monkeypatch.setattr("sys.executable", str(tmp_path / "an env/bin/python"))
    script = tmp_path / "an env/bin/distill"
    script.parent.mkdir(parents=True)
    script.touch()
    folder.best_numbers.unlink()
    *_, before_last, last = run_report(read_run("run")).blocks
    assert text_of(before_last).startswith("7 updates")  # without a best student there is no line about it
    assert text_of(last) == "talk to the student: 'an env/bin/distill' chat run/student"


def test_answers_are_samples_without_control_sequences(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    for label in ("before", "after"):
        rows = [{"prompt": "Why\x07?", "teacher": "\x1b[2JBecause", "student": f"{label}\x1b[0m"}]
        (folder.evaluations / f"{label}-answers.json").write_text(json.dumps(rows))
    (sample,) = (block for block in run_report(read_run(folder.path)).blocks if isinstance(block, Sample))
    assert sample == Sample(
        title="prompt 1, answered greedily",
        prompt="Why?",
        answers=(("teacher", "Because"), ("student before", "before"), ("student after", "after")),
    )
    (folder.evaluations / "after-answers.json").write_text("[]")
    (sample,) = (block for block in run_report(read_run(folder.path)).blocks if isinstance(block, Sample))
    assert [who for who, _ in sample.answers] == ["teacher", "student before"]


def test_a_run_that_is_training_shows_how_far_it_is(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    for path in (folder.summary, folder.evaluation("after"), folder.evaluations / "after-answers.json"):
        path.unlink()
    sentence, table, *_ = run_report(read_run(folder.path)).blocks
    assert text_of(sentence).startswith("After update 40 of 60: On 4 held-out prompts")
    assert isinstance(table, Table)
    assert table.title == "Before training and after update 40, 4 held-out prompts"
    assert [column.heading for column in table.columns] == ["metric", "before", "update 40", "difference", ""]


def test_an_evaluation_that_cannot_be_read(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    folder.evaluation("after").write_bytes(b"half")
    run = read_run(folder.path)
    (problem,) = run.problems
    assert problem.startswith("evaluations/after.parquet cannot be read (")
    assert text_of(run_report(run).blocks[0]).startswith("After update 40 of 60:")
