"""Benchmark ``teacher``: what the teacher actor adds to vLLM's pooling runner.

Ours is the work of the score loop: rows of a corpus are read, ``VllmTeacher.hidden_states`` scores them, and the
states become a payload of bf16 bits that is appended to a segment store. Theirs is vLLM's LLMEngine with the engine
arguments and the environment of ours, on the same texts; it drops the states.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from deploy.benchmarks.harness import Measurement, Say, alternate, rates
from deploy.benchmarks.side import Side
from deploy.benchmarks.workload import draws, model_dir, open_store, prompt_table, scratch
from distill.config import ScoringConfig

NUM_TEXTS = 256
MAX_MODEL_TOKENS = 512


def measure(num_pairs: int, say: Say) -> Measurement:
    """Alternate rounds on two living engines."""
    model = model_dir(say)
    with scratch() as folder:
        corpus = folder / "corpus.parquet"
        _write_corpus(model, corpus, say)
        common = {"model": str(model), "corpus": str(corpus)}
        say("starting two engines")
        with (
            Side("ours", f"{__name__}:OurScoring", {**common, "folder": str(folder)}) as ours,
            Side("bare vLLM", f"{__name__}:BareScoring", common) as bare,
        ):
            sides = {"ours": lambda: ours.call("score"), "bare": lambda: bare.call("score")}
            say("warm-up")
            for side in sides.values():
                side()
            rounds = alternate(num_pairs, sides, say)
            memory = {"ours": ours.pss_bytes(), "bare": bare.pss_bytes()}
    return Measurement(
        pairs={"bare": rates(rounds, "ours", "bare")},
        notes={
            "pss_bytes": memory,
            "num_tokens": rounds[0]["ours"]["num_tokens"],
            "num_texts": NUM_TEXTS,
        },
    )


def _write_corpus(model: Path, path: Path, say: Say) -> None:
    from distill.data.tables import corpus_table, reference_corpus, write_table

    write_table(corpus_table(reference_corpus(prompt_table(model, NUM_TEXTS, say))), path)


def _jobs(num_rows: int) -> list[list[Any]]:
    """The draws of a round, divided as the replay index divides them."""
    every = draws("teacher_text", range(num_rows), num_rows)
    size = ScoringConfig().max_num_seqs
    return [every[first : first + size] for first in range(0, num_rows, size)]


def _num_tokens(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> int:
    """The tokens that the model reads: the last one of a response is never fed."""
    return sum(map(len, prompts)) + sum(map(len, responses)) - len(responses)


class OurScoring:
    """The engine of the teacher actor, its corpus and its store."""

    def __init__(self, teacher: Any, corpus: Any, store: Any) -> None:
        self._teacher = teacher
        self._corpus = corpus
        self._store = store

    @classmethod
    async def start(cls, model: str, corpus: str, folder: str) -> Self:
        from actors.vllm_engine.teacher import VllmTeacher
        from distill.data.tables import TextCorpus

        teacher = await VllmTeacher.start(model, ScoringConfig(), max_model_tokens=MAX_MODEL_TOKENS)
        return cls(teacher, TextCorpus.read(corpus), open_store(folder, "teacher"))

    async def score(self) -> dict[str, float]:
        start = time.perf_counter()
        groups = []
        for job in _jobs(self._corpus.num_rows):
            groups += await _score(job, self._corpus, self._teacher, self._store)
        seconds = time.perf_counter() - start
        rows = [self._corpus.row(group.draw) for group in groups]
        prompts, responses = ([_tokens(row, name) for row in rows] for name in ("prompt", "response"))
        self._store.settle(groups)
        return {"num_tokens": _num_tokens(prompts, responses), "seconds": seconds}

    async def close(self) -> None:
        await self._teacher.close()


async def _score(job: Sequence[Any], corpus: Any, teacher: Any, store: Any) -> list[Any]:
    """What the score loop does with a job, without the replay index."""
    from distill.algorithm import score

    return await score(job, corpus, teacher, store)


def _tokens(row: Any, part: str) -> list[int]:
    return row.column(f"{part}_tokens")[0].as_py()


class BareScoring:
    """vLLM's LLMEngine with the pooling runner."""

    def __init__(self, engine: Any, prompts: list[list[int]], responses: list[list[int]]) -> None:
        self._engine = engine
        self._prompts = prompts
        self._responses = responses
        self._num_requests = 0

    @classmethod
    async def start(cls, model: str, corpus: str) -> Self:
        from distill.data.tables import read_table

        engine = _engine(model)
        table = read_table(corpus)
        return cls(engine, table["prompt_tokens"].to_pylist(), table["response_tokens"].to_pylist())

    async def score(self) -> dict[str, float]:
        start = time.perf_counter()
        for job in _jobs(len(self._prompts)):
            self._score_job([draw.index for draw in job])
        seconds = time.perf_counter() - start
        return {"num_tokens": _num_tokens(self._prompts, self._responses), "seconds": seconds}

    def _score_job(self, rows: Sequence[int]) -> None:
        from vllm import PoolingParams
        from vllm.inputs import tokens_input

        params = PoolingParams(task="token_embed", use_activation=False)
        for row in rows:
            self._num_requests += 1
            tokens = tokens_input([*self._prompts[row], *self._responses[row][:-1]])
            self._engine.add_request(str(self._num_requests), tokens, params)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    async def close(self) -> None:
        self._engine.engine_core.shutdown()


def _engine(model: str) -> Any:
    """An engine with the arguments of ours, without the watchdog."""
    from actors.vllm_engine.startup import STEP_TOKENS, current_device, engine_arguments, set_environment
    from distill.machine.hardware import usable_cores

    set_environment(usable_cores(), 1)
    import torch
    from vllm.config import PoolerConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    torch.set_num_threads(usable_cores())  # before vLLM's CPU worker disables it, as ours does
    arguments = engine_arguments(model, ScoringConfig(), MAX_MODEL_TOKENS, current_device())
    del arguments["worker_extension_cls"]
    return LLMEngine.from_engine_args(
        EngineArgs(
            **arguments,
            runner="pooling",
            max_num_batched_tokens=max(STEP_TOKENS, MAX_MODEL_TOKENS),
            pooler_config=PoolerConfig(task="token_embed", use_activation=False),
            enable_prefix_caching=False,
        )
    )
