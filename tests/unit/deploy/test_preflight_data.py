"""What doctor and the start of a run say about the data: every number is checked on a few rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.run.preflight import Preflight
from tests.tiny import tiny_config

ENGINES = ["rollout.engine=transformers", "scoring.engine=transformers"]


@pytest.fixture
def said(world: Path, tmp_path: Path):
    """Return what the checks of the data say of rows, by status."""

    def run(rows: list[dict], *overrides: str) -> dict[str, list[str]]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        preflight = Preflight(tiny_config(world, *ENGINES, f"data.path={path}", *overrides))
        checks = preflight.run()
        preflight.require()
        about = [check for check in checks if check.name in ("data", "unused columns", "batch")]
        return {
            status: [check.text for check in about if check.status == status] for status in ("pass", "warn")
        }

    return run


def rows_of(num_rows: int) -> list[dict]:
    return [{"prompt": f"say {i}", "completion": f"so {i}"} for i in range(num_rows)]


def test_ordinary_data_has_no_warning(said) -> None:
    heard = said(rows_of(24))
    assert heard["warn"] == []
    counts, split = heard["pass"]
    assert counts == "24 rows of format prompt_completion (prompt, completion): 24 with a reference"
    assert split.startswith("16 training prompts, 8 held out")


def test_columns_that_are_not_read_are_named_with_what_could_be_read(said) -> None:
    rows = [{**row, "category": "a", "context": "b" if i == 0 else None} for i, row in enumerate(rows_of(24))]
    (warning,) = said(rows)["warn"]
    assert warning.startswith(
        "columns that are not read: category (24 rows), context (1 rows); format prompt_completion takes prompt, completion or"
    )


def test_rows_without_answers_are_counted(said) -> None:
    rows = [*rows_of(20), {"prompt": "a"}, {"prompt": "b", "completion": " "}]
    counts = said(rows)["pass"][0]
    assert "20 with a reference, 1 with an empty answer, which is no reference" in counts


def test_repeated_prompts_are_counted_and_never_trained_on_when_held_out(said) -> None:
    rows = [{"prompt": f"say {i % 12}", "completion": f"so {i}"} for i in range(24)]
    heard = said(rows)
    assert "rows whose prompt an earlier row has too: 12" in heard["warn"]
    left_out = next(int(text.rpartition(": ")[2]) for text in heard["warn"] if "prompt is held out" in text)
    assert heard["pass"][1].startswith(f"{16 - left_out} training prompts, 8 held out") and left_out > 0


def test_long_prompts_and_cut_references_are_counted(said) -> None:
    rows = [
        *rows_of(24),
        {"prompt": "x" * 100, "completion": "so"},
        {"prompt": "say", "completion": "y" * 40},
    ]
    warnings = said(rows, "data.on_long_prompt=skip")["warn"]
    assert "rows left out because their prompt is too long: 1" in warnings
    assert "references cut to data.max_reference_tokens: 1" in warnings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "learner.prompts_per_update=17",
            "learner.prompts_per_update=17 is more than the 16 training prompts",
        ),
        ("sft.rows_per_update=17", "sft.rows_per_update=17 is more than the 16 references"),
    ],
)
def test_a_batch_that_is_larger_than_the_data_is_reported(said, override: str, message: str) -> None:
    (warning,) = said(rows_of(24), override)["warn"]
    assert warning.startswith(message)
