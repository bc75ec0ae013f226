"""Writes the teacher corpus: the teacher's answers to the prompts of a table, sampled once before training.

:class:`actors.shells.CorpusActor` makes :class:`CorpusWorker` an actor.

An interrupted writer leaves what it has finished as parts beside the file, and the next one continues there.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from actors.shown import ShownPrompts
from distill.config import CorpusConfig
from distill.data import PromptTable, read_table, write_table
from distill.files import write_json
from distill.interfaces import Draw, Generator
from distill.room import IN_CACHE, advising
from distill.schema import Trajectory, trajectory_batch

ROWS_PER_CALL = 128
"""Texts of the corpus that the teacher samples together."""


class CorpusWorker:
    """Samples the teacher for the corpora and the report of a run."""

    def __init__(self, corpus: CorpusConfig, generator: Generator) -> None:
        self.corpus = corpus
        self.generator = generator
        self.num_rows = self.num_tokens = 0

    async def write(self, prompts_path: str, num_prompts: int, samples_per_prompt: int, path: str) -> int:
        """Write answers to the first prompts of a table to ``path``; returns the number of response tokens."""
        self.num_rows = self.num_tokens = 0
        prompts = PromptTable.read(
            prompts_path,
            samples_per_prompt=samples_per_prompt,
            max_new_tokens=self.corpus.max_new_tokens,
            seed=self.corpus.seed,
        )
        await write_corpus(
            prompts,
            num_prompts,
            self.generator,
            Path(path),
            rows_per_call=ROWS_PER_CALL,
            progress=self._progress,
        )
        return self.num_tokens

    async def answer_shown(self, prompts_path: str, path: str) -> None:
        """Write the teacher's greedy answers to a table's prompts to ``path``, as JSON lists of token ids."""
        shown = ShownPrompts.read(prompts_path, self.corpus.max_new_tokens)
        answers = await shown.answers(self.generator)
        with advising(IN_CACHE):
            write_json(Path(path), {"answers": answers})

    def stats(self) -> dict[str, float]:
        return {
            "corpus/num_rows": float(self.num_rows),
            "corpus/num_tokens": float(self.num_tokens),
            "corpus/num_finished": float(self.generator.num_finished),
        }

    async def close(self) -> None:
        await self.generator.close()

    def _progress(self, num_rows: int, num_tokens: int) -> None:
        self.num_rows, self.num_tokens = num_rows, num_tokens


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

    Raises: NoSpace; the parts that are there are used when it is called again.
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
            with advising(IN_CACHE):
                write_table(pa.Table.from_batches([batch]), part)
        num_tokens += len(batch.column("response_tokens").flatten())
        batches.append(batch)
        progress(indices.stop * samples, num_tokens)
    with advising(IN_CACHE):
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
