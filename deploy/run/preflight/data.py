"""Checks of the data, which is tokenized in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from deploy.fetch import cache_dir
from deploy.run.preflight import template
from deploy.run.preflight.outcome import Check
from distill.config import RunConfig
from distill.data import Example, build_prompts, load_rows, num_skipped_prompts, training_rows
from distill.errors import ConfigError


def prompts(config: RunConfig, tokenizer: Any, stop_token_ids: Sequence[int]) -> pa.Table:
    """Load and tokenize the data.

    Raises: ConfigError.
    """
    rows = load_rows(config.data, cache_dir())
    if config.data.chat_template and tokenizer.chat_template and uses_references(config):
        _require_template_for_turns(rows, tokenizer)
    return build_prompts(rows, tokenizer, config.data, stop_token_ids, config.seed)


def uses_references(config: RunConfig) -> bool:
    """Whether the warm start or the recipe trains on the references of the data."""
    return config.sft.enabled or config.recipe.teacher_text == "reference"


def _require_template_for_turns(rows: Sequence[Example], tokenizer: Any) -> None:
    """Raises: ConfigError when references of several answers need a template that keeps earlier turns."""
    keeps = {
        reasoning: template.keeps_earlier_turns(tokenizer, reasoning=reasoning) for reasoning in (False, True)
    }
    for example in rows:
        answers = [turn.content for turn in example.reference if turn.role == "assistant"]
        reasoning = any("</think>" in answer for answer in answers)
        if len(answers) > 1 and not keeps[reasoning]:
            what = " (it removes the reasoning of earlier answers)" if reasoning else ""
            raise ConfigError(
                f"data row {example.row}", f"{len(answers)} answers",
                f"have one answer, because the teacher's chat template changes earlier turns when more follow{what}",
                "end each row of the data after its first answer, or give the teacher's tokenizer a template that "
                "only adds text",
            )  # fmt: skip


def num_references(table: pa.Table) -> int:
    """Training prompts that have a reference."""
    references = training_rows(table)["reference_tokens"]
    return len(references) - references.null_count


def summary(config: RunConfig, table: pa.Table, num_references: int) -> Check:
    """Check that the data has what the recipe uses.

    Raises: ConfigError.
    """
    data = config.data
    train = table.num_rows - data.num_heldout
    if num_references == 0 and uses_references(config):
        raise ConfigError(
            "data", data.path, "have references (completions), which the warm start or the recipe uses",
                 "add completions, or set sft.enabled=false and recipe.teacher_text=sampled"
        )  # fmt: skip
    num_skipped = num_skipped_prompts(table)
    skipped = f", {num_skipped} skipped because they are too long" if num_skipped else ""
    template = "the teacher's chat template" if data.chat_template else "no chat template"
    return Check(
        "data", "pass", f"{train} training prompts, {data.num_heldout} held out{skipped}; {template}"
    )
