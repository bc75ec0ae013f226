"""How the stages before the training outlive their actors, and notice those that hang.

There is no crew yet that replaces an actor. A stage keeps what it has finished, so it simply begins again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from deploy.cluster.failures import ActorGone
from deploy.run.context import RunContext
from distill.interfaces import EngineDied

P = ParamSpec("P")
T = TypeVar("T")


def outliving(
    stage: Callable[Concatenate[RunContext, P], T],
) -> Callable[Concatenate[RunContext, P], T]:
    """Make a stage that begins again, with new actors, when one of its actors or engines dies or hangs.

    It raises ActorFailed when there were too many restarts (``cluster.max_restarts``), and the error itself when a deadline
    has passed twice: the deadline is more likely to be too short than the actor to hang twice.
    """

    @wraps(stage)
    def begin(run: RunContext, *args: P.args, **kwargs: P.kwargs) -> T:
        begins_again = was_late = False
        while True:
            try:
                if begins_again:
                    run.kill_actors()
                    run.start_learner()
                return stage(run, *args, **kwargs)
            except (ActorGone, EngineDied) as error:
                is_late = isinstance(error, ActorGone) and error.waited_s > 0
                # Actors that share this process cannot be killed, and would work beside their heirs.
                if run.config.cluster.backend == "in_process" or (is_late and was_late):
                    raise
                run.note_failure(error.name, error, "the stage begins again, and keeps what it has finished")
                run.restarts.take(error.name, error)
                begins_again, was_late = True, is_late

    return begin


def wait_for_work(
    run: RunContext,
    name: str,
    work: Any,
    question: Callable[[], Any],
    show: Callable[[Mapping[str, Any]], None] = lambda answer: None,
) -> Any:
    """Wait for the work of an actor; returns its result.

    ``question`` calls the actor for how far it is, and ``show`` receives each answer.

    Raises: ActorGone when the actor dies, does not answer within ``cluster.beat_timeout_s``, or gives the same answer
    for ``cluster.stall_timeout_s``; any error of the work. An actor that shares this process has no deadlines, because
    it cannot answer while it computes.
    """
    config = run.config.cluster
    has_deadlines = config.backend != "in_process"
    answered = moved = time.monotonic()
    last: Any = None

    def look() -> None:
        nonlocal answered, moved, last
        answer = run.backend.poll(question())
        now = time.monotonic()
        if answer is not None:
            answered = now
            show(answer)
        elif has_deadlines and now - answered > config.beat_timeout_s:
            raise ActorGone.silent(name, config.beat_timeout_s, "cluster.beat_timeout_s")
        if answer is not None and answer != last:
            moved, last = now, answer
        elif has_deadlines and now - moved > config.stall_timeout_s:
            raise ActorGone.stalled(name, now - moved, config.stall_timeout_s)

    return run.backend.wait({name: work}, tick=look)[name]
