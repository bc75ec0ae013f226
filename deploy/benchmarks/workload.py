"""The model, the prompts and the texts that the benchmarks measure with: real ones, because lengths matter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from deploy.benchmarks.harness import Say
from deploy.fetch import cache_dir, fetch_data, fetch_model
from distill.config import DataConfig, ReplayConfig
from distill.interfaces import Draw, Table

if TYPE_CHECKING:
    from distill.replay.segments import SegmentStore

MODEL, DATA = "smollm2-135m", "alpaca-demo"
MAX_PROMPT_TOKENS, MAX_TEXT_TOKENS = 256, 128


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in shared memory, where a run has its segments and its pushes; it is removed at the end.

    Its name does not begin like that of a run's folder, because a run that starts sweeps those of dead runs.
    """
    with tempfile.TemporaryDirectory(prefix="bench-distill-", dir="/dev/shm") as folder:
        yield Path(folder)


def open_store(folder: str, writer_id: str) -> SegmentStore:
    """A segment store in a scratch folder, with the sizes that a run has by default."""
    from distill.replay.segments import SegmentStore

    replay = ReplayConfig()
    return SegmentStore(
        memory_dir=Path(folder) / "segments",
        spill_dir=Path(folder) / "spilled",
        writer_id=writer_id,
        node="local",
        segment_bytes=replay.segment_bytes,
        memory_bytes=replay.memory_bytes,
    )


def model_dir(say: Say) -> Path:
    """The folder of the model, which is fetched unless the cache has it."""
    return fetch_model(MODEL, say=say)


def stop_token_ids(model: Path) -> list[int]:
    """The tokens that end a response, as a run takes them."""
    from deploy.run.model_facts import SAVE_AGAIN, ModelFacts

    return list(ModelFacts.read(str(model), "model", SAVE_AGAIN).stop_token_ids)


def prompt_table(model: Path, num_rows: int, say: Say) -> pa.Table:
    """The first ``num_rows`` prompts of the data, tokenized with the chat template, with their references."""
    from transformers import AutoTokenizer

    from distill.data import build_prompts, load_rows, training_rows

    fetch_data(DATA, say=say)
    data = DataConfig(path=DATA, num_heldout=1, max_prompt_tokens=MAX_PROMPT_TOKENS,
                      max_reference_tokens=MAX_TEXT_TOKENS, on_long_prompt="skip")  # fmt: skip
    rows = load_rows(data, cache_dir()).examples[: num_rows * 2]  # long prompts and held-out ones leave gaps
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return training_rows(build_prompts(rows, tokenizer, data, stop_token_ids(model))).slice(0, num_rows)


def draws(table: Table, numbers: Sequence[int], num_rows: int) -> list[Draw]:
    """Draws with these numbers, over the rows of a table in order. A number decides the seeds of its samples."""
    return [Draw(table=table, number=n, epoch=n // num_rows, index=n % num_rows) for n in numbers]
