"""Pooling seeds: which results are rejected, which seeds remain to run, and the pooled results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.study.hashes import stamps
from deploy.study.pooling import load_earlier, only_seeds, pooled, without_seeds_of
from deploy.study.runner import Study
from deploy.study.spec import StudySpec, Tuning
from distill.errors import ConfigError

TUNING = Tuning({"learner.learning_rate": [1.0, 0.1]}, (100,), {}, "teacher_text.tv")
SPEC = StudySpec("s", "tiny-wiki", {"kd": {}}, (0, 1), "kd", ("teacher_text.tv",), tuning=TUNING)
EARLIER = {
    "study": "s", **stamps(), "asked": SPEC.asked(),
    "chosen": {"kd": {"learner.learning_rate": 0.1}}, "tuning": ["t"],
    "runs": [{"seed": 0}], "diverged": [], "differences": [], "teacher": [],
}  # fmt: skip


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(EARLIER | changes))
    return path


def test_remaining_seeds_use_the_earlier_tuning_and_are_pooled(tmp_path: Path):
    earlier = load_earlier(written(tmp_path), SPEC)
    rest = without_seeds_of(SPEC, earlier)
    assert rest.seeds == (1,)
    study = Study(rest, tmp_path / "out", earlier=earlier, say=lambda _: None)
    assert study._tuning_jobs() == {"kd": []}
    assert study._chosen({"kd": []}) == {"kd": {"learner.learning_rate": 0.1}}
    ours = EARLIER | {"runs": [{"seed": 1}], "tuning": []}
    both = pooled(earlier, ours)
    assert [run["seed"] for run in both["runs"]] == [0, 1]
    assert both["tuning"] == ["t"] and both["study"] == "s"


@pytest.mark.parametrize(
    "changes",
    [
        {"method_hash": "other"},
        {"hash_format": 1},
        {"results_hash": "other"},
        {"chosen": {}},
        *({"asked": SPEC.asked() | {name: "other"}} for name in ("task", "baseline", "settings", "recipes")),
    ],
)
def test_results_of_another_study_or_code_are_rejected(tmp_path: Path, changes: dict[str, object]):
    with pytest.raises(ConfigError, match="--with: "):
        load_earlier(written(tmp_path, **changes), SPEC)


def test_errors_when_no_seed_remains_and_when_results_cannot_be_read(tmp_path: Path):
    with pytest.raises(ConfigError, match="add a seed"):
        without_seeds_of(SPEC, EARLIER | {"runs": [{"seed": 0}, {"seed": 1}]})
    with pytest.raises(ConfigError, match="check the path"):
        load_earlier(tmp_path / "none.json", SPEC)
    for text in ("[]", "{}"):
        (tmp_path / "old.json").write_text(text)
        with pytest.raises(ConfigError, match="of this version"):
            load_earlier(tmp_path / "old.json", SPEC)


def test_only_seeds():
    assert only_seeds(SPEC, [1]).seeds == (1,)
    with pytest.raises(ConfigError, match="--seeds=2"):
        only_seeds(SPEC, [0, 2])
