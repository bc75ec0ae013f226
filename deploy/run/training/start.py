"""Starts the actors of the last stage with their engines."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pyarrow.parquet as pq

from deploy.cluster.actor import Actor
from deploy.placement import num_engines
from deploy.run.context import RunContext
from deploy.run.training.fleet import Fleet, Member
from deploy.run.training.replay import LastingReplay
from deploy.run.training.restarts import RESTARTS_PER_RUN
from distill.interfaces import Holder, Role
from distill.run.inputs import RunInputs


def start_fleet(run: RunContext, inputs: RunInputs) -> tuple[Fleet, dict[str, Any] | None]:
    """Start all actors at once, and load the newest checkpoint.

    Returns them with the checkpoint's state, or None in a new run.
    """
    from actors.shells import ReplayActor

    num_teacher_rows = pq.read_metadata(inputs.teacher_text).num_rows
    replay = run.start_actor(
        "replay", ReplayActor, run.config, inputs.num_prompts, num_teacher_rows, revives=True
    )
    members: dict[Role, list[Member]] = {}
    starting: dict[str, Any] = {"learner": run.learner.load.remote(inputs)}
    for role, count in num_engines(run.config).items():
        if role == "proxy" and not inputs.has_proxy:
            continue
        members[role] = []
        for number in range(count):
            # A start that failed has used up the names before this.
            member, call = start_member(run, inputs, role, number, restart=run.restarts.num_restarts)
            members[role].append(member)
            starting[member.actor.name] = call
    state = run.wait_briefly(starting)["learner"]
    run.note_damage(state)
    fleet = Fleet(
        replay=LastingReplay(
            Actor("replay", replay, run.backend),
            state["ledger"] if state else None,
            lambda error: revive_replay(run, error),
            deadline_s=run.config.cluster.start_timeout_s,
        ),
        learner=learner_actor(run),
        rollouts=members["rollout"],
        scorers=members.get("proxy", members["teacher"]),
        teachers=members["teacher"],
        stall_timeout_s=run.config.cluster.stall_timeout_s,
        beat_timeout_s=None
        if run.config.cluster.backend == "in_process"
        else run.config.cluster.beat_timeout_s,
    )
    return fleet, state


async def revive_replay(run: RunContext, error: Exception) -> None:
    """Start the replay's process again. Raises: ActorFailed when there were too many restarts."""
    began = time.monotonic()
    run.note_failure("replay", error, "it is started again")
    run.restarts.take("replay", error)
    await asyncio.to_thread(run.revive_actor, "replay")
    run.note_replaced("replay", "replay", time.monotonic() - began)


def learner_actor(run: RunContext) -> Actor:
    """The learner's actor as it is now, whose calls have a deadline: none of them waits for another actor."""
    return Actor("learner", run.learner, run.backend, stall_timeout_s=run.config.cluster.stall_timeout_s)


def start_member(
    run: RunContext, inputs: RunInputs, role: Role, number: int, *, restart: int
) -> tuple[Member, Any]:
    """Construct an actor of a pool; returns it with the call that loads its engine.

    ``restart``: how many actors with this number the run has had before.
    """
    from actors.shells import RolloutActor, TeacherActor

    holder = Holder(role, number, run.record.folder.incarnation * RESTARTS_PER_RUN + restart)
    name = str(holder)
    if role == "rollout":
        # Without student text, the student is sampled for evaluations only.
        handle = run.start_actor(
            name, RolloutActor, role=role if run.config.recipe.uses_student_text else "sampler"
        )
        call = handle.start.remote(run.config, inputs, holder)
    else:
        handle = run.start_actor(name, TeacherActor, role=role)
        model_dir = inputs.teacher_dir if role == "teacher" else inputs.scoring_dir
        call = handle.start.remote(run.config, inputs, holder, model_dir)
    return Member(holder, Actor(name, handle, run.backend)), call
