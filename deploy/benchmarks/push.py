"""Benchmark ``push``: what a weight push costs above the least that it can cost.

Ours is a whole push of :class:`deploy.run.training.publisher.FleetPublisher` into one engine: it converts the
learner's float32 weights to the engine's number format, writes them to shared memory, hashes them, pauses the engine,
verifies the hash, loads the weights and resumes. Theirs is the floor: one copy of the same bytes in memory, and the
seconds that vLLM's own ``load_weights`` needs for them in the same engine, measured inside the engine, from pages that
have been touched. Both leave the same weights.

The notes contain how long generation stood still, from the call that pauses the engine to the return of the call that
resumes it, in pushes while requests are in flight.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from deploy.benchmarks.harness import Measurement, Say, alternate
from deploy.benchmarks.side import Side
from deploy.benchmarks.workload import model_dir, scratch, stop_token_ids
from deploy.cluster.ray_cluster import actor_environment
from deploy.run.training.publisher import FleetPublisher
from distill.config import RolloutConfig, WeightsConfig
from distill.interfaces import SampleRequest
from distill.machine.hardware import usable_cores

MAX_MODEL_TOKENS = 512
NUM_IN_FLIGHT, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 128
_WARM_UP_TOKENS = 16


def measure(num_pairs: int, say: Say) -> Measurement:
    """Alternate pushes and floors in one engine, then push while it generates."""
    model = model_dir(say)
    with scratch() as folder:
        settings = {"model": str(model), "stop": stop_token_ids(model), "folder": str(folder)}
        say("starting the engine")
        # An allocator that returns freed memory makes each load fault it in again, in both sides.
        with Side(
            "engine", f"{__name__}:Pushing", settings, environment=actor_environment(usable_cores())
        ) as engine:
            sides = {"ours": lambda: engine.call("push"), "floor": lambda: engine.call("floor")}
            say("warm-up")
            for side in sides.values():
                side()
            rounds = alternate(num_pairs, sides, say)
            say("pushes while requests are in flight")
            standstills = [engine.call("push_in_flight")["standstill_s"] for _ in range(num_pairs)]
            memory = engine.pss_bytes()
    return Measurement(
        pairs={"floor": [(found["ours"]["seconds"], found["floor"]["seconds"]) for found in rounds]},
        notes={
            "num_bytes": rounds[0]["ours"]["num_bytes"],
            "dtype": rounds[0]["ours"]["dtype"],
            "standstill_s": standstills,
            "push_write_s": [found["ours"]["write_s"] for found in rounds],
            "floor_copy_s": [found["floor"]["copy_s"] for found in rounds],
            "floor_load_s": [found["floor"]["load_s"] for found in rounds],
            "num_requests_in_flight": NUM_IN_FLIGHT,
            "pss_bytes": memory,
        },
    )


class Pushing:
    """An engine, and the learner's weights in the same process."""

    def __init__(self, generator: Any, weights: Any, folder: Path) -> None:
        """``weights``: a :class:`learner.process.publish.WeightFile` that writes into ``folder``."""
        self._generator = generator
        self._weights = weights
        self._write_s = 0.0
        self._manifest: Any = None
        self._publisher = FleetPublisher(
            self.write_weights, lambda: [generator], itertools.count(1).__next__, folders=[folder],
            deadline_s=WeightsConfig().deadline_s,
        )  # fmt: skip
        self._standstills: list[float] = []
        self._seeds = itertools.count()

    @classmethod
    async def start(cls, model: str, stop: list[int], folder: str) -> Self:
        with _floor_extension():
            from actors.vllm_engine.generator import VllmGenerator

            generator = await VllmGenerator.start(
                model, RolloutConfig(), max_model_tokens=MAX_MODEL_TOKENS, stop_token_ids=stop
            )
        await generator.generate(_requests(itertools.count(), _WARM_UP_TOKENS))
        place = Path(folder) / "weights"
        place.mkdir()
        return cls(generator, _weights(model, place), place)

    async def push(self) -> dict[str, Any]:
        """Publish once; returns its seconds and those of the learner's part."""
        start = time.perf_counter()
        await self._publish()
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "write_s": self._write_s,
            "num_bytes": self._manifest.num_bytes,
            "dtype": str(self._weights.dtype).removeprefix("torch."),
        }

    async def floor(self) -> dict[str, float]:
        """Copy the newest push in memory, then load it with nothing around it."""
        import numpy as np

        source = np.fromfile(self._manifest.path, np.uint8)
        target = np.empty_like(source)
        target.fill(0)  # touches the pages, so that the copy is a copy and nothing else
        start = time.perf_counter()
        np.copyto(target, source)
        copy_s = time.perf_counter() - start
        (load_s,) = await self._generator._engine.collective_rpc("load_floor", args=(self._manifest.path,))
        return {"seconds": copy_s + load_s, "copy_s": copy_s, "load_s": load_s}

    async def push_in_flight(self) -> dict[str, float]:
        """Publish while requests generate; returns how long the engine was paused."""
        running = asyncio.create_task(self._generator.generate(_requests(self._seeds, NEW_TOKENS)))
        await asyncio.sleep(1.0)  # the prompts are prefilled, and the requests generate
        with _paused_seconds(self._generator._engine) as paused:
            await self._publish()
        if running.done():
            raise RuntimeError("the requests ended before the push did; raise NEW_TOKENS")
        await running
        return {"standstill_s": paused[0]}

    async def close(self) -> None:
        await self._generator.close()

    async def _publish(self) -> None:
        await self._publisher.send(await self._publisher.write(0))

    async def write_weights(self, policy_version: int, updates_done: int) -> Any:
        """The learner's part of a push."""
        start = time.perf_counter()
        self._manifest = await asyncio.to_thread(self._weights.write, policy_version, updates_done)
        self._write_s = time.perf_counter() - start
        return self._manifest


def _weights(model: str, folder: Path) -> Any:
    """The file of a push as the learner writes it, over float32 weights, in the engine's number format."""
    import torch
    from transformers import AutoModelForCausalLM

    from actors.vllm_engine.startup import current_device
    from distill.machine.hardware import resolve_dtype
    from learner.process.publish import WeightFile

    student: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    weights = [(name, parameter.detach()) for name, parameter in student.named_parameters()]
    return WeightFile(
        lambda: weights, folder, getattr(torch, resolve_dtype(RolloutConfig().dtype, current_device()))
    )


def _requests(seeds: Iterator[int], max_new_tokens: int) -> list[SampleRequest]:
    """Requests with prompts of arbitrary tokens."""
    return [
        SampleRequest(
            prompt_tokens=[
                (seed * 7919 + position * 104_729) % 40_000 + 100 for position in range(PROMPT_TOKENS)
            ],
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        for seed in itertools.islice(seeds, NUM_IN_FLIGHT)
    ]


@contextmanager
def _paused_seconds(engine: Any) -> Iterator[list[float]]:
    """Yield a list that gets the seconds from the engine's next pause to the end of its resumption."""
    paused: list[float] = []
    since = 0.0
    pause, resume = engine.pause_generation, engine.resume_generation

    async def timed_pause(**options: Any) -> None:
        nonlocal since
        since = time.perf_counter()
        await pause(**options)

    async def timed_resume() -> None:
        await resume()
        paused.append(time.perf_counter() - since)

    engine.pause_generation, engine.resume_generation = timed_pause, timed_resume
    try:
        yield paused
    finally:
        engine.pause_generation, engine.resume_generation = pause, resume


@contextmanager
def _floor_extension() -> Iterator[None]:
    """Let the engine that starts in this block have :class:`deploy.benchmarks.push_floor.FloorExtension`."""
    from actors.vllm_engine import startup

    before = startup.WORKER_EXTENSION
    startup.WORKER_EXTENSION = "deploy.benchmarks.push_floor.FloorExtension"
    try:
        yield
    finally:
        startup.WORKER_EXTENSION = before
