"""The pipeline: which part runs when, and what each part waits for.

    prompts ─► rollout_loop ─► store, replay ─► score_loop ─► store, replay ─► train_loop
                    ▲                                ▲                             │
                    │ weights v+1      teacher text ─┘                             │
                    └───────────────────────────────────────── publisher ◄─────────┘

| loop           | consumes                | produces             | waits for                            |
|----------------|-------------------------|----------------------|--------------------------------------|
| `rollout_loop` | admitted draws          | student groups       | the rate limiter (`replay.admit`)    |
| `score_loop`   | groups, teacher draws   | groups with payload  | something unscored                   |
| `train_loop`   | the groups of update u  | weights of version v | all groups of u scored, none too old |

The three loops are written against the protocols of :mod:`distill.interfaces`. What one update
computes is elsewhere: ``learner/update/update.py`` contains the method and
:mod:`distill.objectives` its formulas.

A group consists of all rollouts of one draw. It is stored before it is announced, so that every
process that receives its reference can read it. ``policy_version`` counts pushes, ages count updates.

In one process the loops run under ``asyncio.gather`` (tests/unit/test_algorithm.py). In a cluster
each runs in an actor of its own with a remote replay. The functions are the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from distill.errors import DistillError
from distill.interfaces import (
    Corpus,
    Draw,
    Generator,
    GroupRef,
    Learner,
    Lease,
    Prompts,
    Publisher,
    Replay,
    ScoringJob,
    Store,
    Teacher,
)
from distill.schema import with_teacher_hidden


class RunStopped(DistillError, RuntimeError):
    """The replay was stopped before the last update."""

    code = "stopped"


class Milestones(Protocol):
    """The work around the updates: records, evaluations, checkpoints."""

    async def before_training(self, updates_done: int, policy_version: int) -> None: ...

    async def after_update(
        self, updates_done: int, policy_version: int, lease: Lease, metrics: dict[str, float]
    ) -> None: ...


async def rollout_loop(
    replay: Replay, prompts: Prompts, generator: Generator, store: Store, *, max_draws: int, together: bool
) -> None:
    """Answer every admitted draw with the student's samples.

    ``together``: sample all draws of an admission in one call (in lock-step their order is part of
    the result). Otherwise each draw is a call, so that a finished group does not wait for others.
    """
    async with asyncio.TaskGroup() as running:
        while draws := await replay.admit(max_draws):
            for batch in [draws] if together else [[draw] for draw in draws]:
                running.create_task(_roll_out(batch, replay, prompts, generator, store))


async def _roll_out(
    draws: list[Draw], replay: Replay, prompts: Prompts, generator: Generator, store: Store
) -> None:
    await replay.insert(await roll_out(draws, prompts, generator, store))


async def roll_out(
    draws: Sequence[Draw], prompts: Prompts, generator: Generator, store: Store
) -> list[GroupRef]:
    """Sample and store one group per draw."""
    completions = await generator.generate(prompts.requests(draws))
    batches = prompts.groups(draws, completions)
    return [store.append(draw, batch) for draw, batch in zip(draws, batches, strict=True)]


async def score_loop(
    replay: Replay, corpus: Corpus, teacher: Teacher | None, store: Store, *, max_groups: int
) -> None:
    """Add the teacher's payload to rolled-out groups and to rows of teacher text.

    ``teacher``: None for a recipe whose losses need no payload.
    """
    while job := await replay.take_for_scoring(max_groups):
        await replay.insert_scored(await score(job, corpus, teacher, store))


async def score(job: ScoringJob, corpus: Corpus, teacher: Teacher | None, store: Store) -> list[GroupRef]:
    """Score a job in one call to the teacher and store the groups with their payload.

    Without a teacher, rolled-out groups stay where they are, and rows of the corpus are stored as they are.
    """
    if teacher is None:
        rows = zip(job.teacher_draws, corpus.rows(job.teacher_draws), strict=True)
        return [*job.groups, *(store.append(draw, batch) for draw, batch in rows)]
    draws = [group.draw for group in job.groups] + list(job.teacher_draws)
    batches = [store.read(group) for group in job.groups] + corpus.rows(job.teacher_draws)
    prompts = [tokens for batch in batches for tokens in batch.column("prompt_tokens").to_pylist()]
    responses = [tokens for batch in batches for tokens in batch.column("response_tokens").to_pylist()]
    hidden = await teacher.hidden_states(prompts, responses)
    scored: list[GroupRef] = []
    first = 0
    for draw, batch in zip(draws, batches, strict=True):
        payload = hidden[first : first + batch.num_rows]
        scored.append(store.append(draw, with_teacher_hidden(batch, payload)))
        first += batch.num_rows
    return scored


async def train_loop(
    replay: Replay,
    store: Store,
    learner: Learner,
    publisher: Publisher,
    milestones: Milestones,
    *,
    updates_done: int,
    num_updates: int,
) -> None:
    """Train from ``updates_done`` to ``num_updates``.

    The push comes before the milestones so that an evaluation samples from the weights that it
    measures. ``advance`` comes last because it admits the next rollouts.

    Raises: RunStopped when the replay ends early; WeightPushError; any error of an update.
    """
    version = await publisher.publish(updates_done)
    await milestones.before_training(updates_done, version)
    await replay.advance(updates_done, version)
    while updates_done < num_updates:
        lease = await replay.lease(updates_done)
        if lease is None:
            raise RunStopped(
                "updates done when the replay stopped", updates_done, f"be {num_updates}", "resume the run"
            )
        batches = [store.read(group) for group in lease.groups]
        metrics = await asyncio.to_thread(learner.update, batches)
        await replay.acknowledge(updates_done)
        updates_done += 1
        version = await publisher.publish(updates_done)
        await milestones.after_update(updates_done, version, lease, metrics)
        await replay.advance(updates_done, version)
