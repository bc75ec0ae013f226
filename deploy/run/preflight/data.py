"""Checks of the data, which is tokenized in full."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from deploy.fetch import cache_dir
from deploy.run.preflight.outcome import Check
from distill.config import RunConfig
from distill.data import build_prompts, load_rows, num_skipped_prompts, training_rows
from distill.errors import ConfigError


def prompts(config: RunConfig, tokenizer: Any, stop_token_ids: Sequence[int]) -> pa.Table:
    """Load and tokenize the data.

    Raises: ConfigError.
    """
    rows = load_rows(config.data, cache_dir())
    return build_prompts(rows, tokenizer, config.data, stop_token_ids, config.seed)


def num_references(table: pa.Table) -> int:
    """Training prompts that have a reference."""
    references = training_rows(table)["reference_tokens"]
    return len(references) - references.null_count


def summary(config: RunConfig, table: pa.Table, num_references: int) -> Check:
    """Check that the data has what the recipe uses.

    Raises: ConfigError.
    """
    data, recipe = config.data, config.recipe
    train = table.num_rows - data.num_heldout
    if num_references == 0 and (config.sft.enabled or recipe.teacher_text == "reference"):
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
