"""Starts the actors of the last stage with their engines."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from deploy.cluster.actor import Actor
from deploy.placement import num_engines
from deploy.run.context import RunContext
from deploy.run.training.fleet import Fleet, Member
from distill.interfaces import Holder, Role
from distill.run.inputs import RunInputs

RESTARTS_PER_RUN = 1000
"""Incarnations of an actor that one incarnation of its run may use up, so that no two have the same name."""


def start_fleet(run: RunContext, inputs: RunInputs) -> tuple[Fleet, dict[str, Any] | None]:
    """Start all actors at once, and load the newest checkpoint.

    Returns them with the checkpoint's state, or None in a new run.
    """
    from actors.shells import ReplayActor

    num_teacher_rows = pq.read_metadata(inputs.teacher_text).num_rows
    replay = run.start_actor("replay", ReplayActor, run.config, inputs.num_prompts, num_teacher_rows)
    members: dict[Role, list[Member]] = {}
    starting: dict[str, Any] = {"learner": run.learner.load.remote(inputs)}
    for role, count in num_engines(run.config).items():
        if role == "proxy" and not inputs.has_proxy:
            continue
        members[role] = []
        for number in range(count):
            member, call = start_member(run, inputs, role, number)
            members[role].append(member)
            starting[member.actor.name] = call
    state = run.wait_briefly(starting)["learner"]
    if state is not None:
        run.wait_briefly({"replay": replay.load_state.remote(state["ledger"])})
    fleet = Fleet(
        replay=Actor("replay", replay, run.backend),
        learner=Actor(
            "learner", run.learner, run.backend, stall_timeout_s=run.config.cluster.stall_timeout_s
        ),
        rollouts=members["rollout"],
        scorers=members.get("proxy", members["teacher"]),
        teachers=members["teacher"],
    )
    return fleet, state


def start_member(
    run: RunContext, inputs: RunInputs, role: Role, number: int, *, restart: int = 0
) -> tuple[Member, Any]:
    """Construct an actor of a pool; returns it with the call that loads its engine.

    ``restart``: how many actors with this number the run has had before.
    """
    from actors.shells import RolloutActor, TeacherActor

    holder = Holder(role, number, run.record.folder.incarnation * RESTARTS_PER_RUN + restart)
    # Without student text, the student is sampled for evaluations only.
    name = str(holder) if role != "rollout" or run.config.recipe.uses_student_text else "sampler"
    if role == "rollout":
        handle = run.start_actor(name, RolloutActor, role="sampler" if name == "sampler" else role)
        call = handle.start.remote(run.config, inputs, holder)
    else:
        handle = run.start_actor(name, TeacherActor, role=role)
        model_dir = inputs.teacher_dir if role == "teacher" else inputs.scoring_dir
        call = handle.start.remote(run.config, inputs, holder, model_dir)
    return Member(holder, Actor(name, handle, run.backend)), call
