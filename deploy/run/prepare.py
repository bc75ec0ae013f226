"""Writes what a run needs on disk before its actors start: the prompt tables.

The tables are in the run folder; they are small and are written again when they are missing. Teacher
corpora, proxies and models are in the cache, because runs share them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from deploy.run.cache import corpus_file
from deploy.run.identity import checkpoint_fingerprint
from deploy.run.preflight import Preflight
from distill.config import RunConfig
from distill.data import (
    Example,
    Turn,
    build_prompts,
    corpus_table,
    heldout_rows,
    reference_corpus,
    training_rows,
    write_table,
)
from distill.machine.hardware import resolve_dtype
from distill.run.folder import HELDOUT_PROMPTS, TRAINING_PROMPTS, RunFolder
from distill.run.inputs import RunInputs
from distill.schema import trajectory_schema

NUM_SHOWN = 3
"""Held-out prompts whose answers the report shows, unless the configuration lists others."""
NODE = "local"
"""A run uses the shared memory of one node."""


def prepare(
    config: RunConfig, preflight: Preflight, folder: RunFolder, teacher: str | None = None
) -> RunInputs:
    """Write the tables; returns the inputs of the first stage.

    ``teacher``: the fingerprint of its checkpoint, which is taken here unless the caller has it.
    """
    if not folder.has_prompts:  # an earlier start died in between, and the data can have changed since
        for table in folder.data.glob("*.parquet"):
            table.unlink()
    train, heldout = training_rows(preflight.prompts), heldout_rows(preflight.prompts)
    references = None
    if preflight.num_references:
        references = _table(
            folder.data / "references.parquet", corpus_table(reference_corpus(preflight.prompts))
        )
    sampling = _sampling(config, preflight, teacher or checkpoint_fingerprint(preflight.teacher.folder))
    num_corpus_prompts = 0
    if config.recipe.teacher_text == "sampled":
        num_corpus_prompts = min(config.corpus.num_prompts or train.num_rows, train.num_rows)
        # Held-out prompts have one sample each, so their corpus does not depend on this number.
        samples = {"samples_per_prompt": config.corpus.samples_per_prompt}
        teacher_text = corpus_file(sampling | samples, train, num_corpus_prompts)
    elif config.recipe.teacher_text == "reference":
        assert references is not None  # the preflight has checked it
        teacher_text = references
    else:
        teacher_text = _table(folder.data / "no-text.parquet", trajectory_schema().empty_table())
    shown = _shown_prompts(config, preflight, heldout)
    teacher_dir = str(preflight.teacher.folder)
    return RunInputs(
        run_dir=str(folder.path),
        run_id=folder.run_id,
        node=NODE,
        teacher_dir=teacher_dir,
        scoring_dir=teacher_dir,
        student_dir=str(_student(config, preflight, folder)),
        proxy_init=str(preflight.proxy.folder) if preflight.proxy is not None else None,
        train_prompts=str(_table(folder.data / TRAINING_PROMPTS, train)),
        heldout_prompts=str(_table(folder.data / HELDOUT_PROMPTS, heldout)),
        num_prompts=train.num_rows,
        references=str(references) if references is not None else None,
        teacher_text=str(teacher_text),
        num_corpus_prompts=num_corpus_prompts,
        heldout_corpus=str(corpus_file(sampling, heldout, config.evaluation.num_prompts)),
        shown_prompts=str(_table(folder.data / "shown.parquet", shown)),
        teacher_answers=str(
            corpus_file(sampling | {"decoding": "greedy"}, shown, shown.num_rows).with_suffix(".json")
        ),
        stop_token_ids=preflight.teacher.stop_token_ids,
        num_tokens=preflight.num_tokens,
    )


def _table(path: Path, table: pa.Table) -> Path:
    """Write a table unless an earlier incarnation has."""
    if not path.exists():
        write_table(table, path)
    return path


def _shown_prompts(config: RunConfig, preflight: Preflight, heldout: pa.Table) -> pa.Table:
    """The prompt table of ``evaluation.shown_prompts``, or the first held-out prompts."""
    texts = config.evaluation.shown_prompts
    if texts is None:
        return heldout.slice(0, NUM_SHOWN)
    rows = [
        Example(row=row, prompt=(Turn(role="user", content=text),), reference=())
        for row, text in enumerate(texts)
    ]
    data = replace(config.data, num_heldout=0)
    return build_prompts(rows, preflight.tokenizer, data, preflight.teacher.stop_token_ids)


def _sampling(config: RunConfig, preflight: Preflight, teacher: str) -> dict[str, object]:
    """Everything but the prompts that decides the teacher's text on them. The rollout engine samples it."""
    return {
        "teacher": teacher,
        "max_new_tokens": config.corpus.max_new_tokens,
        "seed": config.corpus.seed,
        "stop": preflight.teacher.stop_token_ids,
        "num_tokens": preflight.num_tokens,
        "engine": config.rollout.engine,
        "dtype": resolve_dtype(config.rollout.dtype),
    }


def _student(config: RunConfig, preflight: Preflight, folder: RunFolder) -> Path:
    """The student's checkpoint; the first stage writes it when it is cut from the teacher."""
    return preflight.student.folder if config.student.init.source is None else folder.cut
