"""Standard errors, paired differences, and what an evaluation keeps."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from distill.config import EVALUATION_METRICS
from distill.evaluation import (
    EXTRA_METRICS,
    METRICS,
    Evaluation,
    direction,
    is_better,
    load_evaluation,
    paired_difference,
    save_evaluation,
)
from distill.evaluation.measurement import _PromptSums
from tests.unit.evaluation.builders import measured

# Standard errors


def evaluation_of(metric: str, per_prompt: dict[int, list[float]], label: str = "e") -> Evaluation:
    sums = _PromptSums(np.array(sorted(per_prompt)))
    for prompt, values in per_prompt.items():
        sums.add(metric, np.full(len(values), prompt), np.array(values))
    return Evaluation(label, sums.table())


def test_equal_lengths_give_the_textbook_standard_error():
    found = evaluation_of("entropy", {i: [float(i), float(i)] for i in (1, 2, 3, 4)}).estimate("entropy")
    assert found.value == 2.5
    assert found.stderr == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)


def test_unequal_lengths_weigh_tokens_exactly():
    found = evaluation_of("entropy", {0: [1.0], 1: [1.0, 2.0]}).estimate("entropy")
    assert found.value == pytest.approx(4 / 3)
    assert found.stderr == pytest.approx(2 / 9)  # residuals -1/9 and 1/9; sqrt(2 · 2/81)


def test_standard_error_is_the_spread_over_resampled_prompts():
    random = np.random.default_rng(0)

    def draw() -> Evaluation:
        texts = {}
        for prompt in range(40):
            level = random.normal()  # shared by the prompt's tokens, so they are not independent
            texts[prompt] = list(level + random.normal(size=random.integers(1, 30)))
        return evaluation_of("entropy", texts)

    estimates = [draw().estimate("entropy") for _ in range(300)]
    spread = np.std([found.value for found in estimates])
    assert np.mean([found.stderr for found in estimates]) == pytest.approx(spread, rel=0.12)


def test_one_prompt_gives_no_standard_error_and_no_prompt_no_value():
    one = evaluation_of("entropy", {3: [1.0, 2.0]})
    assert one.estimate("entropy").value == 1.5
    assert math.isnan(one.estimate("entropy").stderr)
    assert math.isnan(one.value("length"))
    assert one.to_dict()["stderr"]["entropy"] is None
    assert one.to_dict()["length"] is None


def test_pairing_removes_the_variance_between_prompts():
    before = evaluation_of("teacher_text.tv", {0: [0.1], 1: [0.5], 2: [0.9]})
    after = evaluation_of("teacher_text.tv", {0: [0.05], 1: [0.45], 2: [0.85]})
    difference = paired_difference(before, after)
    assert set(difference) == {"teacher_text.tv"}
    assert difference["teacher_text.tv"].value == pytest.approx(-0.05)
    assert difference["teacher_text.tv"].stderr == pytest.approx(0, abs=1e-12)
    assert after.estimate("teacher_text.tv").stderr > 0.2


def test_paired_standard_error_exactly():
    before = evaluation_of("entropy", {0: [1.0], 1: [2.0], 2: [4.0]})
    after = evaluation_of("entropy", {0: [2.0], 1: [2.0], 2: [7.0]})
    found = paired_difference(before, after)["entropy"]
    assert found.value == pytest.approx(4 / 3)
    assert found.stderr == pytest.approx(np.std([1, 0, 3], ddof=1) / math.sqrt(3))


def test_pairing_uses_the_prompts_that_both_evaluations_have():
    before = evaluation_of("entropy", {5: [1.0], 1: [2.0], 9: [100.0]})
    after = evaluation_of("entropy", {0: [-50.0], 1: [3.0], 5: [2.0]})
    assert paired_difference(before, after)["entropy"].value == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least two prompts"):
        paired_difference(before, evaluation_of("entropy", {9: [1.0]}))


def test_paired_error_with_different_text_lengths_is_the_spread_of_differences():
    random = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(300):
        level = random.normal(size=30) * 3
        both = [
            {i: list(level[i] + shift + random.normal(size=random.integers(5, 30))) for i in range(30)}
            for shift in (0.0, 0.5)
        ]
        found = paired_difference(*(evaluation_of("entropy", texts) for texts in both))["entropy"]
        values.append(found.value)
        errors.append(found.stderr)
    assert np.mean(values) == pytest.approx(0.5, abs=0.05)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


# What is kept


def test_to_dict_has_exactly_its_keys():
    found = measured().to_dict()
    assert set(found) == {
        "teacher_text", "student_text", "rouge_l", "entropy", "length", "num_prompts", "stderr",
    }  # fmt: skip
    assert (
        set(found["teacher_text"]) == set(found["student_text"]) == {"tv", "forward_kl", "reverse_kl", "jsd"}
    )
    assert set(found["rouge_l"]) == {"teacher", "reference"}
    assert set(found["stderr"]) == set(METRICS)
    assert set(METRICS) == {*EVALUATION_METRICS, "entropy", "length"}
    assert found["num_prompts"] == 3
    json.dumps(found, allow_nan=False)


def test_an_evaluation_survives_saving_and_loading(tmp_path):
    found = measured()
    path = save_evaluation(tmp_path / "evaluations", found)
    assert path == tmp_path / "evaluations" / "step-3.parquet"
    loaded = load_evaluation(path)
    assert loaded.label == "step-3"
    assert loaded.table.equals(found.table)
    assert [p.name for p in path.parent.iterdir()] == ["step-3.parquet"]


def test_bad_labels_and_foreign_files_are_rejected(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(ValueError, match="names a file"):
        save_evaluation(tmp_path, Evaluation("../evil", measured().table))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="must be an evaluation of version 1"):
        load_evaluation(tmp_path / "other.parquet")
    with pytest.raises(KeyError, match="no metric"):
        measured().value("teacher_text.vt")


def test_best_metric():
    assert direction("teacher_text.tv") == -1
    assert direction("rouge_l.reference") == 1
    assert direction("entropy") == direction("length") == 0
    assert is_better("teacher_text.tv", 0.2, 0.3)
    assert not is_better("teacher_text.tv", 0.3, 0.3)
    assert is_better("rouge_l.teacher", 0.4, 0.3)
    assert is_better("rouge_l.teacher", 0.0, None)
    assert not is_better("teacher_text.tv", math.nan, None)
    assert is_better("teacher_text.tv", 9.0, math.nan)
    assert all(direction(name) for name in EVALUATION_METRICS)
    assert "truncated" in EXTRA_METRICS


def test_reading_an_evaluation_loads_no_torch():
    code = "import sys, distill.evaluation; sys.exit(bool({'torch', 'transformers', 'rouge_score'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
