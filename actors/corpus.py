"""Writes the teacher corpus: the teacher's answers to the prompts of a table, sampled once before training.

An interrupted writer leaves what it has finished as parts beside the file, and the next one continues there.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from distill.data import PromptTable, read_table, write_table
from distill.interfaces import Draw, Generator
from distill.schema import Trajectory, trajectory_batch


async def write_corpus(
    prompts: PromptTable,
    num_prompts: int,
    generator: Generator,
    path: Path,
    *,
    rows_per_call: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write the answers to the first ``num_prompts`` prompts to ``path``, in the order of the prompts.

    ``prompts`` determines the number of samples of a prompt, whose rows are adjacent. ``progress`` is called
    with the numbers of rows and tokens done, those of an earlier writer's parts included.
    """
    parts = path.with_name(f"{path.stem}.parts")
    batches: list[pa.RecordBatch] = []
    num_tokens = 0
    samples = prompts.samples_per_prompt
    prompts_per_call = max(1, rows_per_call // samples)
    for first in range(0, num_prompts, prompts_per_call):
        indices = range(first, min(first + prompts_per_call, num_prompts))
        part = parts / f"{indices.start}-{indices.stop}.parquet"
        batch = _read(part)
        if batch is None:
            draws = [Draw(table="teacher_text", number=i, epoch=0, index=i) for i in indices]
            batch = trajectory_batch(await _answers(prompts, draws, generator))
            write_table(pa.Table.from_batches([batch]), part)
        num_tokens += len(batch.column("response_tokens").flatten())
        batches.append(batch)
        progress(indices.stop * samples, num_tokens)
    write_table(pa.Table.from_batches(batches), path)
    shutil.rmtree(parts, ignore_errors=True)


def _read(part: Path) -> pa.RecordBatch | None:
    """The rows of a part, unless it is missing: never written, or removed by a run that was faster."""
    try:
        [batch] = read_table(part).combine_chunks().to_batches()
    except FileNotFoundError:
        return None
    return batch


async def _answers(prompts: PromptTable, draws: Sequence[Draw], generator: Generator) -> list[Trajectory]:
    requests = prompts.requests(draws)
    completions = await generator.generate(requests)
    samples = itertools.product(draws, range(prompts.samples_per_prompt))  # in the order of the requests
    return [
        Trajectory(
            draw_id=draw.draw_id,
            source="teacher",
            prompt_index=draw.index,
            sample_index=sample,
            prompt_tokens=request.prompt_tokens,
            response_tokens=completion.response_tokens,
            behavior_logprobs=completion.logprobs,
            finish_reason=completion.finish_reason,
        )
        for (draw, sample), request, completion in zip(samples, requests, completions, strict=True)
    ]
