"""Checks of the data, which is tokenized in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from deploy.run.preflight.outcome import Check
from distill.config import RunConfig
from distill.data import LoadedRows, build_prompts, prompt_facts, read_table, training_rows
from distill.errors import ConfigError
from distill.run.folder import HELDOUT_PROMPTS, TRAINING_PROMPTS, RunFolder


def columns(rows: LoadedRows) -> Iterator[Check]:
    """What is read from the data set, and the columns that are not."""
    yield Check("data", "pass", rows.summary())
    if rows.unused_columns:
        unused = ", ".join(f"{name} ({count} rows)" for name, count in rows.unused_columns.items())
        yield Check(
            "unused columns",
            "warn",
            f"columns that are not read: {unused}; format {rows.format} takes {rows.possible_columns}",
            "rename a column that should be read, or ignore this",
        )


def trains_on_references(config: RunConfig) -> bool:
    """Whether a run uses references as text to learn from, and not only to compare with."""
    return config.sft.enabled or config.recipe.teacher_text == "reference"


def prompts(config: RunConfig, rows: LoadedRows, tokenizer: Any, stop_token_ids: Sequence[int]) -> pa.Table:
    """Tokenize the data.

    Raises: ConfigError.
    """
    return build_prompts(
        rows.examples,
        tokenizer,
        config.data,
        stop_token_ids,
        config.seed,
        references_required=trains_on_references(config),
    )


def stored_prompts(folder: RunFolder, prompts: pa.Table) -> pa.Table | None:
    """The prompt table that the run to be resumed began with, if ``prompts`` is another one by now."""
    if not folder.has_prompts:
        return None
    stored = pa.concat_tables(
        [read_table(folder.data / name) for name in (TRAINING_PROMPTS, HELDOUT_PROMPTS)]
    )
    return None if stored.equals(prompts) else stored


def changed() -> Check:
    """What a resumed run says about data that is not what it began with."""
    return Check(
        "data",
        "warn",
        "the data, the tokenizer or the chat template has changed since this run began; it keeps to the "
        "prompts in its folder",
        "use another run_dir to train on the new data",
    )


def num_references(table: pa.Table) -> int:
    """Training prompts whose reference is trained on."""
    references = training_rows(table)["reference_tokens"]
    return len(references) - references.null_count


def summary(config: RunConfig, table: pa.Table, num_references: int) -> Iterator[Check]:
    """Check that the data has what the recipe uses.

    Raises: ConfigError.
    """
    data, recipe = config.data, config.recipe
    if num_references == 0 and trains_on_references(config):
        raise ConfigError(
            "data", data.path, "have references (answers), which the warm start or the recipe uses",
                 "add answers, or name their column with data.answer_column, or set sft.enabled=false and "
                 "recipe.teacher_text=sampled"
        )  # fmt: skip
    num_train = table.num_rows - data.num_heldout
    template = "the teacher's chat template" if data.chat_template else "no chat template"
    yield Check("data", "pass", f"{num_train} training prompts, {data.num_heldout} held out; {template}")
    for what, count in prompt_facts(table).described().items():
        if count:
            yield Check("data", "warn", f"{what}: {count}")
    batches = {
        "learner.prompts_per_update": (config.learner.prompts_per_update, num_train, "training prompts")
    }
    if recipe.teacher_text == "reference":
        batches["learner.teacher_rows_per_update"] = (
            config.learner.teacher_rows_per_update,
            num_references,
            "references",
        )
    if config.sft.enabled:
        batches["sft.rows_per_update"] = (config.sft.rows_per_update, num_references, "references")
    for setting, (size, available, kind) in batches.items():
        if size > available:
            message = f"{setting}={size} is more than the {available} {kind}, so every update repeats some"
            yield Check("batch", "warn", message, "lower it, or add data")
