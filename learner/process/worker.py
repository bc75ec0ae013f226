"""The learner of a run as a plain class: critics, student, and everything around their updates.

Composes the parts of this package; the actor's shell is :class:`learner.process.shell.LearnerActor`.
Other actors are objects with the methods of their workers, local or remote.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from typing import Any

from distill.algorithm import train_loop
from distill.config import RunConfig
from distill.machine.hardware import resolve_micro_batch_tokens
from distill.replay.segments import SegmentStore
from distill.run.alarms import Alarms
from distill.run.folder import PolicyVersionCounter, RunFolder
from distill.run.inputs import RunInputs
from distill.run.store import open_store
from learner.distiller import Distiller
from learner.model.head import Head
from learner.model.student import Student
from learner.process.adaptive_share import AdaptiveShare
from learner.process.checkpoint import Checkpoints
from learner.process.evaluator import Evaluator, HeldoutActors, HeldoutTexts, PolicyScorer
from learner.process.milestones import ReplayControl, RunMilestones
from learner.process.publish import SharedMemoryPublisher, WeightReceiver, push_dtype
from learner.process.recorder import Recorder, ReportFacts, resumed_alarms
from learner.process.saver import Saver, StudentWriter
from learner.process.teacher_check import check_teacher

Stats = Callable[[], Awaitable[dict[str, float]]]


class LearnerWorker:
    """One learner rank, at the newest checkpoint of its run."""

    def __init__(self, config: RunConfig, inputs: RunInputs, report: ReportFacts) -> None:
        """Load the models and the newest checkpoint. ``report``: takes facts for the live line."""
        self.config = config
        self.inputs = inputs
        self.report = report
        self.folder = RunFolder(inputs.run_dir)
        student = Student(
            inputs.student_dir, precision=config.learner.precision, device=config.learner.device
        )
        self.distiller = Distiller(config, student, inputs.scoring_dir)
        self.checkpoints = Checkpoints(self.folder.checkpoints, config.checkpoint.keep)
        self.writer = StudentWriter(inputs, chat_template=config.data.chat_template)
        self.alarms = Alarms()
        self.adaptive_share = AdaptiveShare(config.recipe, self.folder)
        self.resumed_state: dict[str, Any] | None = None
        """The state of the checkpoint that was loaded; None in a new run."""
        newest = self.checkpoints.latest()
        if newest is not None:
            tensors, state = self.checkpoints.load(newest)
            self.distiller.load(tensors, state)
            self.alarms = resumed_alarms(self.folder, state)
            self.adaptive_share = AdaptiveShare(config.recipe, self.folder, state["adaptive_share"])
            self.resumed_state = state

    async def train(
        self,
        replay: Any,
        heldout: HeldoutActors,
        receivers: Sequence[WeightReceiver],
        actor_stats: Sequence[Stats],
    ) -> dict[str, Any]:
        """From the loaded state to the last update; returns counters for the summary.

        ``replay``: the service, as :class:`distill.interfaces.Replay` and as ``ReplayControl``.
        """
        store = open_store(self.config.replay, self.inputs, "learner")
        publisher, scorer = self._publisher(receivers), self._scorer()
        # A run that ends by an error keeps its last rows, which explain it.
        with closing(Recorder(self.folder, self.alarms, self.report)) as recorder:
            await self._check_teacher(heldout, store, scorer.teacher_head, recorder)
            milestones = self._milestones(
                replay,
                recorder,
                Evaluator(self.folder, heldout, store, scorer, HeldoutTexts(self.inputs)),
                [publisher.stats, *actor_stats],
            )
            num_updates = self.config.learner.num_updates
            self.report(activity="training", num_updates=num_updates, started=time.time())
            start = time.monotonic()
            await train_loop(
                replay,
                store,
                self.distiller,
                publisher,
                milestones,
                updates_done=self.distiller.updates_done,
                num_updates=num_updates,
            )
        await asyncio.to_thread(self.writer.write, self.distiller.student, self.folder.student)
        seconds = time.monotonic() - start
        return {
            "updates": self.distiller.updates_done,
            "policy_version": PolicyVersionCounter(self.folder.path).last,
            "num_tokens": self.distiller.num_tokens,
            "timing_s": {"training": seconds - sum(milestones.seconds.values()), **milestones.seconds},
        }

    def _publisher(self, receivers: Sequence[WeightReceiver]) -> SharedMemoryPublisher:
        return SharedMemoryPublisher(
            weights=self.distiller.student.named_weights,
            receivers=receivers,
            next_version=PolicyVersionCounter(self.folder.path).next,
            folder=self.inputs.weights,
            deadline_s=self.config.weights.deadline_s,
            dtype=push_dtype(self.config),
        )

    def _milestones(
        self,
        replay: ReplayControl,
        recorder: Recorder,
        evaluator: Evaluator,
        stats: Sequence[Stats],
    ) -> RunMilestones:
        states = {"adaptive_share": self.adaptive_share.state, "alarms": self.alarms.state}
        return RunMilestones(
            self.config,
            replay,
            recorder,
            evaluator,
            Saver(self.folder, self.checkpoints, self.distiller, self.writer, states),
            self.adaptive_share,
            stats,
        )

    async def _check_teacher(
        self, heldout: HeldoutActors, store: SegmentStore, head: Head, recorder: Recorder
    ) -> None:
        """Raises: ConfigError when the engine's teacher is another distribution than the learner's."""
        num_texts = min(self.config.scoring.check, self.config.evaluation.num_prompts)
        if num_texts == 0:
            return
        self.report(activity="comparing the teacher's engine with the learner")
        head = head.prefix(self.inputs.num_tokens)
        tv = await check_teacher(heldout, store, self.inputs.heldout_corpus, num_texts, head)
        recorder.event("teacher_checked", num_texts=num_texts, tv=tv)

    def _scorer(self) -> PolicyScorer:
        """Evaluations compare with the teacher itself, even where a proxy stands in for it in training."""
        student, teacher = self.distiller.student, self.distiller.teacher
        if self.inputs.has_proxy:
            teacher = Head.from_checkpoint(self.inputs.teacher_dir, device=student.device)
        learner = self.config.learner
        micro_batch_tokens = resolve_micro_batch_tokens(learner.micro_batch_tokens, student.device.type)
        return PolicyScorer(student, teacher, micro_batch_tokens, learner.vocabulary_chunk)
