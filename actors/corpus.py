"""Writes the teacher corpus: the teacher's answers to the prompts of a table, sampled once before training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pyarrow as pa

from distill.data import PromptTable
from distill.interfaces import Draw, Generator
from distill.schema import Trajectory, trajectory_batch


async def write_corpus(
    prompts: PromptTable,
    num_prompts: int,
    generator: Generator,
    *,
    rows_per_call: int,
    progress: Callable[[int, int], None],
) -> pa.Table:
    """Answer the first ``num_prompts`` prompts; the rows are in the order of the prompts.

    ``prompts`` determines the number of samples of a prompt, whose rows are adjacent. ``progress`` is called
    with the numbers of rows and tokens done.
    """
    batches: list[pa.RecordBatch] = []
    num_tokens = 0
    samples = prompts.samples_per_prompt
    prompts_per_call = max(1, rows_per_call // samples)
    for first in range(0, num_prompts, prompts_per_call):
        indices = range(first, min(first + prompts_per_call, num_prompts))
        draws = [Draw(table="teacher_text", number=i, epoch=0, index=i) for i in indices]
        batch = trajectory_batch(await _answers(prompts, draws, generator))
        num_tokens += len(batch.column("response_tokens").flatten())
        batches.append(batch)
        progress(indices.stop * samples, num_tokens)
    return pa.Table.from_batches(batches)


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
            finish_reason=completion.finish_reason,
        )
        for (draw, sample), request, completion in zip(samples, requests, completions, strict=True)
    ]
