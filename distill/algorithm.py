"""The pipeline: which part runs when, and what each part waits for.

    prompts ─► rollout_loop ─► store, replay ─► score_loop ─► store, replay ─► train_loop
                    ▲                                ▲                             │
                    │ weights v+1      teacher text ─┘                             │
                    └───────────────────────────────────────── publisher ◄─────────┘

| loop           | consumes                | produces             | waits for                            |
|----------------|-------------------------|----------------------|--------------------------------------|
| `rollout_loop` | admitted draws          | student samples      | the rate limiter                     |
| `score_loop`   | samples, teacher draws  | rows with payload    | something unscored                   |
| `train_loop`   | the groups of update u  | weights of version v | all groups of u scored, none too old |

The three loops are written against the protocols of :mod:`distill.interfaces`. What one update
computes is elsewhere: ``learner/update/update.py`` contains the method and
:mod:`distill.objectives` its formulas.

A row is stored before it is announced, so that every process that receives its reference can read it. A *group*
consists of all rows of one draw, and the learner gets whole groups. ``policy_version`` counts pushes, ages count
updates.

Several actors may run the first two loops, each at a :class:`~distill.replay.desk.Desk` of its own. With
``together`` (lock-step), an actor processes all work of an answer in one call to its engine, because what is
computed together decides the last bits of a result. Otherwise every sample goes its own way: it is scored as soon
as it is finished, and what comes in joins the running steps of the engine.

In one process the loops run under ``asyncio.gather`` (tests/unit/test_algorithm.py). In a cluster
each runs in an actor of its own with a remote replay. The functions are the same.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pyarrow as pa

from distill.errors import DistillError
from distill.interfaces import (
    Completion,
    Corpus,
    Draw,
    Generator,
    Learner,
    Lease,
    Prompts,
    Publisher,
    Replay,
    SampleRef,
    SampleRequest,
    Store,
    Teacher,
    WeightManifest,
    Work,
)
from distill.replay.desk import Desk
from distill.schema import tokens_of, with_teacher_hidden

_STORING = ThreadPoolExecutor(1, thread_name_prefix="storing")
"""Builds and writes the rows of this process. It is one thread, because several only hand Python's lock to one
another."""


class RunStopped(DistillError, RuntimeError):
    """The replay was stopped before the last update."""

    code = "stopped"


class Milestones(Protocol):
    """The work around the updates: records, evaluations, checkpoints."""

    async def before_training(self, updates_done: int, policy_version: int) -> None: ...

    def samples_after(self, updates_done: int) -> bool:
        """Whether :meth:`after_update` samples the student, so that its weights must be in the engines."""
        ...

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None: ...


async def rollout_loop(
    desk: Desk, prompts: Prompts, generator: Generator, store: Store, *, together: bool
) -> None:
    """Answer every draw of the desk with the student's samples, until the run is over."""
    async with asyncio.TaskGroup() as running:
        async for work in desk:
            draws = [draw for draw in work if isinstance(draw, Draw)]
            if together:
                running.create_task(_deliver(desk, roll_out(draws, prompts, generator, store)))
                continue
            for draw in draws:
                for sample, request in enumerate(prompts.requests([draw])):
                    one = _roll_out_sample(draw, sample, request, prompts, generator, store)
                    running.create_task(_deliver(desk, one))


async def roll_out(
    draws: Sequence[Draw], prompts: Prompts, generator: Generator, store: Store
) -> list[SampleRef]:
    """Sample and store the groups of some draws in one call to the generator."""
    completions = await generator.generate(prompts.requests(draws))
    samples = itertools.product(draws, range(prompts.samples_per_prompt))  # in the order of the requests
    rows = zip(samples, completions, strict=True)
    return [
        await _stored(_store_sample, draw, sample, completion, prompts, store)
        for (draw, sample), completion in rows
    ]


async def _roll_out_sample(
    draw: Draw, sample: int, request: SampleRequest, prompts: Prompts, generator: Generator, store: Store
) -> list[SampleRef]:
    [completion] = await generator.generate([request])
    return [await _stored(_store_sample, draw, sample, completion, prompts, store)]


def _store_sample(
    draw: Draw, sample: int, completion: Completion, prompts: Prompts, store: Store
) -> SampleRef:
    """Build and write a row."""
    return store.append(draw, sample, prompts.row(draw, sample, completion))


async def score_loop(
    desk: Desk, corpus: Corpus, teacher: Teacher | None, store: Store, *, together: bool
) -> None:
    """Add the teacher's payload to the desk's samples and rows of teacher text, until the run is over.

    ``teacher``: None for a recipe whose losses need no payload.
    """
    async with asyncio.TaskGroup() as running:
        async for work in desk:
            for batch in [work] if together else [[each] for each in work]:
                running.create_task(_deliver(desk, score(batch, corpus, teacher, store)))


async def score(
    work: Sequence[Work], corpus: Corpus, teacher: Teacher | None, store: Store
) -> list[SampleRef]:
    """Score samples and rows of teacher text in one call to the teacher, and store them with their payload.

    Without a teacher, samples stay where they are, and rows of the corpus are stored as they are.
    """
    if teacher is None:
        return [
            each if isinstance(each, SampleRef) else await _stored(store.append, each, 0, corpus.row(each))
            for each in work
        ]
    rows = [store.read(each) if isinstance(each, SampleRef) else corpus.row(each) for each in work]
    hidden = await teacher.hidden_states(
        [tokens_of(row, "prompt_tokens") for row in rows],
        [tokens_of(row, "response_tokens") for row in rows],
    )
    return [
        await _stored(_store_scored, each, row, states, store)
        for each, row, states in zip(work, rows, hidden, strict=True)
    ]


def _store_scored(work: Work, row: pa.RecordBatch, states: np.ndarray, store: Store) -> SampleRef:
    draw, sample = (work.draw, work.sample) if isinstance(work, SampleRef) else (work, 0)
    return store.append(draw, sample, with_teacher_hidden(row, [states]))


async def _stored(store: Callable[..., SampleRef], *args: object) -> SampleRef:
    """Store a row in a thread, because the event loop serves the engine."""
    return await asyncio.get_running_loop().run_in_executor(_STORING, store, *args)


async def _deliver(desk: Desk, work: Coroutine[None, None, list[SampleRef]]) -> None:
    desk.deliver(await work)


async def train_loop(
    replay: Replay,
    learner: Learner,
    publisher: Publisher,
    milestones: Milestones,
    *,
    updates_done: int,
    num_updates: int,
    lock_step: bool,
) -> None:
    """Train from ``updates_done`` to ``num_updates``.

    A push starts when its update is done. In lock-step it ends before the milestones, and ``advance``, which admits
    the next rollouts, comes after them, so that nothing runs at the same time. Otherwise ``advance`` waits for
    the push and for nothing else: the engines load the weights of one update while the learner computes the next.

    Raises: RunStopped when the replay ends early; WeightPushError; any error of an update.
    """
    manifest = await publisher.write(updates_done)
    await publisher.send(manifest)
    await milestones.before_training(updates_done, manifest.policy_version)
    await replay.advance(updates_done, manifest.policy_version)
    pushing: asyncio.Task[None] | None = None
    try:
        while updates_done < num_updates:
            lease = await replay.lease(updates_done)
            if lease is None:
                raise RunStopped(
                    "updates done when the replay stopped",
                    updates_done,
                    f"be {num_updates}",
                    "resume the run",
                )
            metrics = await learner.update(lease)
            await replay.acknowledge(updates_done)
            updates_done += 1
            if pushing is not None:
                await pushing  # one push at a time, in the order of the versions
            manifest = await publisher.write(updates_done)
            if lock_step:
                await publisher.send(manifest)
                await milestones.after_update(updates_done, manifest.policy_version, lease, metrics)
                await replay.advance(updates_done, manifest.policy_version)
                continue
            pushing = asyncio.create_task(_push(manifest, replay, publisher))
            if milestones.samples_after(updates_done):
                await pushing
            await milestones.after_update(updates_done, manifest.policy_version, lease, metrics)
        if pushing is not None:
            await pushing
    finally:
        if pushing is not None:
            pushing.cancel()


async def _push(manifest: WeightManifest, replay: Replay, publisher: Publisher) -> None:
    await publisher.send(manifest)
    await replay.advance(manifest.update, manifest.policy_version)
