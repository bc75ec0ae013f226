"""The last stage of a run: the loops of all actors, and the driver's own, until the last update.

The driver runs :func:`distill.algorithm.train_loop` and alone writes into the run folder, apart from checkpoints and
students, which the learner writes at its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from deploy.cluster.failures import ActorGone, root_cause
from deploy.run.context import RunContext
from deploy.run.telemetry.exporter import Exporter, RayMeter, export_repeatedly
from deploy.run.tracking.trackers import Trackers
from deploy.run.training.adaptive_share import AdaptiveShare
from deploy.run.training.advice import Advice, advise
from deploy.run.training.clocks import Limit, StageClocks, held_back, limit_of
from deploy.run.training.crew import Crew
from deploy.run.training.evaluations import Evaluations
from deploy.run.training.fleet import Fleet
from deploy.run.training.live import LiveTraining
from deploy.run.training.milestones import RunMilestones, Spent
from deploy.run.training.publisher import FleetPublisher
from deploy.run.training.recorder import Recorder, resumed_alarms
from deploy.run.training.scale import answer_requests
from deploy.run.training.tracing import RunTrace, TracedLearner, TracedPublisher, TracedReceiver, TracedReplay
from distill.algorithm import train_loop
from distill.config import RunConfig
from distill.errors import first_line
from distill.interfaces import WeightManifest
from distill.run.alarms import Alarms
from distill.run.folder import RunFolder
from distill.run.inputs import RunInputs, shared_memory_root
from distill.run.policy_version import PolicyVersionCounter

SHOW_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a finished training contributes to the summary."""

    updates: int
    policy_version: int
    timing_s: dict[str, float]
    """Seconds by activity of the driver's loop, and those that pushes and updates waited for evaluations and
    checkpoints beside them."""
    limit: Limit | None
    """The stage that limited the whole training."""
    advice: Advice | None
    """What would make it faster."""
    actors: dict[str, dict[str, float]]
    """The counters of every actor that makes rows, by its name, and of the learner."""


async def train_fleet(
    run: RunContext,
    inputs: RunInputs,
    fleet: Fleet,
    state: dict[str, Any] | None,
    live: LiveTraining,
    trackers: Trackers,
) -> Trained:
    """Train from the learner's loaded state to the last update.

    ``state``: that of the checkpoint which the learner loaded; None in a new run.

    Raises: the first error of an actor or of the loop, with the actor's name.
    """
    folder, config = RunFolder(inputs.run_dir), run.config
    rows = {
        "student_text": inputs.num_prompts,
        "teacher_text": pq.read_metadata(inputs.teacher_text).num_rows,
    }

    def make_recorder(state: dict[str, Any] | None) -> Recorder:
        alarms = resumed_alarms(folder, state) if state else Alarms()
        return Recorder(folder, alarms, live.report, run.setup(), trackers, trace, rows)

    # A run that ends by an error keeps its last spans, which explain it.
    with closing(RunTrace(folder, run.progress.say)) as trace:

        async def write_weights(version: int, updates_done: int) -> WeightManifest:
            manifest: WeightManifest = await fleet.learner.write_weights(version, updates_done)
            run.room.note_weights(manifest, inputs)
            return manifest

        publisher = FleetPublisher(
            write_weights,
            lambda: [TracedReceiver(member, trace) for member in fleet.rollouts if fleet.serves(member)],
            PolicyVersionCounter(folder.path).next,
            folders=[inputs.weights, folder.replay],
            deadline_s=config.weights.deadline_s,
            room=run.room,
            failed=lambda receiver, error: fleet.failed(receiver.member, error),
        )
        try:
            async with asyncio.TaskGroup() as group:
                crew = Crew(run, inputs, fleet, publisher, group)
                await fleet.replay.start()
                crew.start()
                beside = [
                    group.create_task(_repeat(live.show)),
                    group.create_task(_repeat(trackers.report)),
                    group.create_task(answer_requests(config, folder, crew, run.progress.say)),
                    group.create_task(export(run, inputs, fleet, live)),
                ]
                trained = await _train_on(run, inputs, fleet, publisher, crew, state, make_recorder)
                crew.stop()
                for task in beside:
                    task.cancel()
        except ExceptionGroup as errors:  # the first of them is the cause of the others
            raise root_cause(errors) from errors
    return trained


async def export(run: RunContext, inputs: RunInputs, fleet: Fleet, live: LiveTraining) -> None:
    """Export what happens, if there is a Ray that publishes it. A failure ends the export and not the run."""
    try:
        address = run.backend.metrics_address()
        if address is None:
            return
        folder = RunFolder(inputs.run_dir)
        folder.write_metrics_target(address)
        exporter = Exporter(RayMeter(), inputs.run_id)
        await export_repeatedly(
            exporter, lambda: live.facts, fleet.stats_now, run.memory, folder.path, shared_memory_root()
        )
    except Exception as error:
        run.progress.say(f"warning: the run exports no numbers any more ({first_line(error)})")


async def _repeat(show: Callable[[], None]) -> None:
    while True:
        show()
        await asyncio.sleep(SHOW_EVERY_S)


async def _train_on(
    run: RunContext,
    inputs: RunInputs,
    fleet: Fleet,
    publisher: FleetPublisher,
    crew: Crew,
    state: dict[str, Any] | None,
    make_recorder: Callable[[dict[str, Any] | None], Recorder],
) -> Trained:
    """Train to the last update; a learner that is gone is replaced, and the training goes back to its checkpoint."""
    whole, spent = StageClocks(), Spent()
    while True:
        # A run that ends by an error keeps its last rows, which explain it.
        with closing(make_recorder(state)) as recorder:
            try:
                return await _train(run, inputs, fleet, publisher, state, recorder, whole, spent)
            except ActorGone as error:
                if error.name != fleet.learner.name:
                    raise
                lost = error
        state = await crew.replace_learner(lost)


async def _train(
    run: RunContext,
    inputs: RunInputs,
    fleet: Fleet,
    publisher: FleetPublisher,
    state: dict[str, Any] | None,
    recorder: Recorder,
    whole: StageClocks,
    spent: Spent,
) -> Trained:
    """``whole`` and ``spent``: the clocks of the training, which a learner that is started again continues."""
    config, trace, folder = run.config, recorder.trace, RunFolder(inputs.run_dir)
    clocks = StageClocks()

    async def stats() -> dict[str, float]:
        counters, spans = await asyncio.gather(fleet.stats(), fleet.spans())
        trace.write(spans)
        counters |= publisher.stats()
        run.room.note_rows(counters, inputs)
        return counters | clocks.shares(counters)

    updates_done = state["updates_done"] if state else 0
    share = AdaptiveShare(config.recipe, folder, state["adaptive_share"] if state else None)
    aside = not config.replay.lock_step
    evaluations = Evaluations(fleet, publisher, folder, inputs, of_copy=aside, room=run.room)
    await _check_teacher(config, evaluations, recorder)
    milestones = RunMilestones(config, folder, fleet, recorder, evaluations, share, stats, spent, run.room)
    num_updates = config.learner.num_updates
    recorder.report(activity="training", num_updates=num_updates)
    try:
        await train_loop(
            TracedReplay(fleet.replay, trace),
            TracedLearner(fleet.learner, trace),
            TracedPublisher(publisher, trace),
            milestones,
            updates_done=updates_done,
            num_updates=num_updates,
            lock_step=config.replay.lock_step,
        )
    finally:
        milestones.close()
    await run.room.of(lambda: fleet.learner.write_student())
    timing = spent.by_activity(lock_step=config.replay.lock_step)
    timing["push_waited_for_evaluations"] = publisher.waited_s
    trace.write(await fleet.spans())
    counters = await fleet.stats()
    row = counters | whole.shares(counters)
    return Trained(
        limit=limit_of(row),
        advice=advise(row, run.setup()),
        updates=num_updates,
        policy_version=publisher.newest.policy_version if publisher.newest else 0,
        timing_s=timing,
        actors={
            **{str(holder): counters for holder, counters in fleet.departed.items()},
            **await fleet.stats_of(fleet.members),
            "learner": await fleet.learner.stats(),
        },
    )


async def _check_teacher(config: RunConfig, evaluations: Evaluations, recorder: Recorder) -> None:
    """Raises: ConfigError when the engine's teacher is another distribution than the learner's."""
    num_texts = min(config.scoring.check, config.evaluation.num_prompts)
    if num_texts == 0:
        return
    recorder.report(activity="comparing the teacher's engine with the learner")
    tv = await evaluations.check_teacher(num_texts)
    recorder.event("teacher_checked", num_texts=num_texts, tv=tv)


def training_summary(trained: Trained, config: RunConfig) -> str:
    """What limited a training, and what would change that, in one line."""
    parts = [trained.advice.text] if trained.advice is not None else []
    if not config.replay.lock_step:
        parts.append(held_back(trained.timing_s))
    return "; ".join(parts)
