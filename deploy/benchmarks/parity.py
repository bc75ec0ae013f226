"""Measures the gap between the log-probabilities of the rollout engine and of the learner, on a run's student.

    python -m deploy.benchmarks.parity runs/demo --dtype bfloat16

Both compute the same function, with different kernels and number formats. An on-policy update cannot
distinguish the gap from a policy that is slightly stale.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploy.exits import DONE, guarded
from distill.config import RolloutConfig
from distill.config.load import load_config
from distill.errors import ConfigError
from distill.run.folder import RunFolder


@dataclass(frozen=True)
class Parity:
    """|log μ(a) − log π(a)| over sampled tokens, in nats, with μ the engine and π the learner."""

    num_tokens: int
    mean: float
    p99: float
    largest: float

    @classmethod
    def of(cls, gaps: Sequence[float]) -> Parity:
        sizes = np.abs(np.asarray(gaps, np.float64))
        return cls(len(sizes), float(sizes.mean()), float(np.quantile(sizes, 0.99)), float(sizes.max()))


def measure_parity(
    run_dir: str | Path, *, dtype: str, learner_dtype: str, num_prompts: int, max_new_tokens: int
) -> Parity:
    """Sample held-out prompts of a finished run with vLLM, and score the tokens as the learner does.

    Raises: ConfigError when the run or its student does not exist.
    """
    folder = RunFolder(run_dir)
    folder.require()
    if not folder.student.is_dir():
        raise ConfigError("run_dir", run_dir, "contain student/, which a run writes at its end", "resume it")
    config = load_config(folder.config)
    rollout = RolloutConfig(
        engine="vllm",
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        kv_cache_gib=config.rollout.kv_cache_gib,
    )
    return asyncio.run(
        _measure(folder, rollout, config.max_model_tokens, learner_dtype, num_prompts, max_new_tokens)
    )


async def _measure(
    folder: RunFolder,
    rollout: RolloutConfig,
    max_model_tokens: int,
    learner_dtype: str,
    num_prompts: int,
    max_new_tokens: int,
) -> Parity:
    # vLLM reads its environment when it is imported, so it starts before anything else is loaded.
    from actors.build import build_generator
    from distill.data import PromptTable
    from distill.interfaces import Draw

    generator = await build_generator(
        str(folder.student),
        rollout,
        max_model_tokens=max_model_tokens,
        stop_token_ids=(),
        num_tokens=None,
        on_push="recompute",
        lock_step=False,
        seed=0,
    )
    prompts = PromptTable.read(
        str(folder.data / "heldout.parquet"),
        samples_per_prompt=1,
        max_new_tokens=max_new_tokens,
        seed=0,
    )
    draws = [Draw(table="heldout", number=i, epoch=0, index=i) for i in range(num_prompts)]
    completions = await generator.generate(prompts.requests(draws))
    batches = [
        prompts.row(*each) for each in zip(draws, itertools.repeat(0), completions, strict=False)
    ]  # one sample each
    await generator.close()
    return await asyncio.to_thread(_gaps, folder.student, batches, learner_dtype)


def _gaps(student_dir: Path, batches: Sequence[Any], learner_dtype: Any) -> Parity:
    import torch

    from learner.batch import token_batch
    from learner.model.head import Head
    from learner.model.student import Student

    student = Student(student_dir, precision=learner_dtype)
    head = Head(student.head_weight.detach(), student.transform.detach())
    gaps: list[float] = []
    for pack in token_batch(batches, 2048).to(student.device).packs:
        with torch.no_grad():
            logprobs = head.logits(student.states(pack)).log_softmax(-1)
        chosen = logprobs.gather(1, pack.targets[:, None])[:, 0]
        gaps += (pack.behavior_logprobs - chosen).tolist()
    return Parity.of(gaps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the gap; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.benchmarks.parity", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the engine"
    )
    parser.add_argument("--learner-dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=16, help="number of held-out prompts")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    # The libraries read these when they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return guarded(_print_parity, options)


def _print_parity(options: argparse.Namespace) -> int:
    found = measure_parity(
        options.run_dir,
        dtype=options.dtype,
        learner_dtype=options.learner_dtype,
        num_prompts=options.prompts,
        max_new_tokens=options.max_new_tokens,
    )
    print(
        f"engine {options.dtype}, learner {options.learner_dtype}, {found.num_tokens} tokens: "
        f"mean {found.mean:.2e}, 99 % {found.p99:.2e}, largest {found.largest:.2e} nats"
    )
    return DONE


if __name__ == "__main__":
    sys.exit(main())
